"""Reading shard sets: every byte that is decoded was hashed in the very buffer that is decoded."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from qwen_lora.errors import ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import FileEntry, Manifest, RecordMeta
from qwen_lora.shards.manifest import (
    MANIFEST,
    fingerprint_difference,
    load_manifest,
    read_listed,
    read_retired,
)
from qwen_lora.shards.previews import PreviewPrompt, RgbMap, read_previews, read_rgb
from qwen_lora.shards.record import (
    LATENT_NAMES,
    Record,
    RecordShape,
    decode_meta,
    decode_tensors,
    unconditional_shape,
)
from qwen_lora.shards.sidecar import decode_table
from qwen_lora.shards.store import Place, Store, open_store
from qwen_lora.shards.table import SampleTable, join_tables
from qwen_lora.shards.tar import tar_bytes

if TYPE_CHECKING:
    import torch

    from qwen_lora.shards.remote.cache import ShardCache


class ShardSet:
    """One generation of a shard set, open for reading; safe to use from several threads.

    Opening checks the manifest, every sidecar's hash and every shard's length; reading checks the
    members. Nothing is extracted, unpickled or executed.
    """

    def __init__(
        self, store: Store, manifest: Manifest, generation: str, table: SampleTable
    ) -> None:
        self.store, self.manifest = store, manifest
        self.generation = generation  # file name of the manifest's generation
        self.table = table
        self._files = _OpenFiles(store)
        channels, scale = manifest.latent_channels, manifest.latent_scale
        self._channels, self._scale = channels, scale
        self._latent_names = LATENT_NAMES[manifest.posterior]

    @classmethod
    def open(
        cls, place: Place, generation: str | None = None, cache: ShardCache | None = None
    ) -> ShardSet:
        """Open the newest generation, or a named one (`manifest-<hash>.json`), of a folder or URL;
        what is remote is kept in `cache`, or the default one.

        Raises InputError when there is no set at `place` or it needs a newer version, ShardError
        when a file of it is missing or not what the manifest says.
        """
        store = open_store(place, cache)
        try:
            return cls.of_manifest(store, *load_manifest(store, generation or MANIFEST))
        except BaseException:
            if store is not place:
                store.close()
            raise

    @classmethod
    def of_manifest(cls, place: Place, manifest: Manifest, generation: str) -> ShardSet:
        """Open what a manifest lists; it may be one that is yet to be published."""
        store = open_store(place)
        store.prepare(entry.sidecar for entry in manifest.shards)
        parts = []
        for index, entry in enumerate(manifest.shards):
            store.check(entry.tar)
            parts.append(_table(store, manifest, index))
        table = join_tables(parts)
        retired = read_retired(store, manifest)
        if retired:
            live = (sample not in retired for sample in table.sample_id)
            table = table.take(np.fromiter(live, np.bool_, len(table)))
        if twins := table.repeated():
            first, second = (manifest.shards[table.shard[row]].tar.name for row in sorted(twins))
            raise ShardError(
                f"{store.label}: sample {table.sample_id[twins[0]]} stands in {first} and in "
                f"{second}; copy the set again from its source"
            )
        return cls(store, manifest, generation, table)

    def __len__(self) -> int:
        return len(self.table)

    def shape(self, row: int) -> RecordShape:
        """What the tensors of a row must look like."""
        height, width = self.table.bucket[row].tolist()
        return RecordShape(
            self._latent_names,
            (self._channels, height // self._scale, width // self._scale),
            self.table.tokens_of(row),
            self.manifest.text_width,
        )

    def read_meta(self, row: int) -> RecordMeta:
        """The JSON member of a row alone."""
        return decode_meta(self._member(row, 0), self.where(row))

    def read_bytes(self, row: int) -> tuple[memoryview, memoryview]:
        """The JSON and safetensors members of a row, hashes checked. Raises ShardError."""
        return self._member(row, 0), self._member(row, 1)

    def read(self, row: int, captions: Sequence[int] | None = None) -> Record:
        """Decode a row: latents always, and the tensors of the asked captions (default: all).

        Tensors are CPU tensors as stored: float16 latents [C, h, w], bfloat16 `prompt_embeds.i`
        [T_i, D], bool `prompt_mask.i` [T_i]. Raises ShardError, naming the sample and the file.
        """
        meta, tensors = self.read_bytes(row)
        what = self.where(row)
        return Record(
            decode_meta(meta, what), decode_tensors(tensors, self.shape(row), captions, what)
        )

    def unconditional(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The empty prompt's embedding [T, D] bfloat16 and mask [T] bool."""
        entry = self.manifest.unconditional
        data = read_listed(self.store, entry)
        shape = unconditional_shape(data, self.manifest.text_width, entry.name)
        tensors = decode_tensors(data, shape, None, entry.name)
        return tensors["prompt_embeds.0"], tensors["prompt_mask.0"]

    def rgb_map(self) -> RgbMap | None:
        """The linear map from latents to RGB, None when the set has none. Imports no torch."""
        return read_rgb(self.store, self.manifest)

    def preview_prompts(self) -> list[PreviewPrompt]:
        """The prompts that previews draw, with their embeddings; empty when the set has none."""
        return read_previews(self.store, self.manifest)

    def tar_of(self, row: int) -> FileEntry:
        """The shard that holds a row."""
        return self.manifest.shards[int(self.table.shard[row])].tar

    def where(self, row: int) -> str:
        tar = self.tar_of(row).name
        return f"{self.store.where(tar)}, sample {self.table.sample_id[row]}"

    def _member(self, row: int, member: int) -> memoryview:
        entry, table = self.tar_of(row), self.table
        offset, size = int(table.member_offsets[row, member]), int(table.member_bytes[row, member])
        try:
            data = self._files.read(entry, offset, size)
        except OSError as error:
            raise ShardError(f"{self.where(row)} cannot be read: {error.strerror}") from error
        if self._intact(data, row, member):
            return data
        if self.store.repair(entry):  # the disk of a cache lost it
            self._files.forget(entry)
            data = self._files.read(entry, offset, size)
            if self._intact(data, row, member):
                return data
        raise ShardError(
            f"{self.where(row)}: damaged ({len(data)} of {size} bytes, sha256 "
            f"{sha256_hex(data)[:12]}); "
            "copy the shard again from its source, or delete it and run precompute again"
        )

    def _intact(self, data: memoryview, row: int, member: int) -> bool:
        expected = self.table.member_sha256[row, member].tobytes()
        return bool(hashlib.sha256(data).digest() == expected)

    def close_files(self) -> None:
        """Close the shards, not the store."""
        self._files.close()

    def close(self) -> None:
        self._files.close()
        self.store.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _table(store: Store, manifest: Manifest, index: int) -> SampleTable:
    """One shard's rows, its sidecar checked against the manifest."""
    entry = manifest.shards[index]
    what = store.where(entry.sidecar.name)
    fingerprint, table = decode_table(read_listed(store, entry.sidecar), what, index)
    if fingerprint.hash != manifest.fingerprint.hash:
        lines = fingerprint_difference(manifest.fingerprint, fingerprint)
        raise ShardError(
            f"{store.where(entry.tar.name)} was made with other encoders than the manifest says "
            f"({'; '.join(lines)}); run precompute again into a new folder"
        )
    if len(table) != entry.samples or tar_bytes(table.end) != entry.tar.bytes:
        raise ShardError(
            f"{what}: {len(table)} samples that end at byte {table.end}, the manifest says "
            f"{entry.samples} samples in {entry.tar.bytes} bytes"
        )
    if (table.bucket % manifest.latent_scale).any():
        raise ShardError(f"{what}: a bucket is not a multiple of {manifest.latent_scale} pixels")
    return table


class _OpenFile:
    """A tar with the number of reads under way; changed under the lock of its `_OpenFiles`."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.reads, self.forgotten = file, 0, False


class _OpenFiles:
    """Tars open for positional reads, the least recently used closed first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._most = store.open_files
        self._lock = threading.Lock()

    def read(self, entry: FileEntry, offset: int, size: int) -> memoryview:
        opened = self._borrow(entry)
        try:
            return _read_at(opened.file.fileno(), offset, size)
        finally:
            with self._lock:
                opened.reads -= 1
                if opened.forgotten and not opened.reads:
                    opened.file.close()
                self._close_surplus()

    def forget(self, entry: FileEntry) -> None:
        """Open it anew at the next read; reads under way end with the file that they have."""
        with self._lock:
            opened = self._open.pop(entry.name, None)
            if opened is not None:
                opened.forgotten = True
                if not opened.reads:
                    opened.file.close()

    def _borrow(self, entry: FileEntry) -> _OpenFile:
        opened = self._take(entry.name)
        if opened is None:
            file = self._store.open(entry)  # may wait for a download: nobody else waits with it
            opened = self._take(entry.name, file)
            assert opened is not None
            if opened.file is not file:
                file.close()
        return opened

    def _take(self, name: str, file: BinaryIO | None = None) -> _OpenFile | None:
        """The open file of that name, else `file`; counted as being read."""
        with self._lock:
            if self._most == 0:
                if file is not None:
                    file.close()
                raise ValueError(f"{self._store.label}: this shard set was closed")
            opened = self._open.pop(name, None) or (_OpenFile(file) if file is not None else None)
            if opened is not None:
                self._open[name] = opened
                opened.reads += 1
            return opened

    def _close_surplus(self) -> None:
        """Close the oldest files that nobody reads, until few enough are open."""
        surplus = len(self._open) - self._most
        if surplus <= 0:
            return
        idle = [name for name, opened in self._open.items() if not opened.reads]
        for name in idle[:surplus]:
            self._open.pop(name).file.close()

    def close(self) -> None:
        """Close what nobody reads; a read under way closes its file when it ends."""
        with self._lock:
            self._most = 0
            self._close_surplus()


_seek_lock = threading.Lock()  # where there is no pread, a file's position is shared


def _read_at(descriptor: int, offset: int, size: int) -> memoryview:
    """`size` bytes, or fewer at the end of the file: the one buffer that is hashed and decoded."""
    data = np.empty(size, np.uint8).data  # a bytearray would be zeroed first
    if not hasattr(os, "preadv"):  # Windows
        with _seek_lock, os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(offset)
            return data[: file.readinto(data)]
    done = 0
    while done < size and (more := os.preadv(descriptor, [data[done:]], offset + done)):
        done += more
    return data[:done]
