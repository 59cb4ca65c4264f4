"""Reading shard sets: every byte that is decoded was hashed in the very buffer that is decoded."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from qwen_lora.errors import ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import Manifest, RecordMeta
from qwen_lora.shards.manifest import (
    MANIFEST,
    check_length,
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
from qwen_lora.shards.table import SampleTable, join_tables
from qwen_lora.shards.tar import tar_bytes

if TYPE_CHECKING:
    import torch

OPEN_FILES = 64  # tars held open at once


class ShardSet:
    """One generation of a shard set, open for reading; safe to use from several threads.

    Opening checks the manifest, every sidecar's hash and every shard's length; reading checks the
    members. Nothing is extracted, unpickled or executed.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, generation: str, table: SampleTable
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.generation = generation  # file name of the manifest's generation
        self.table = table
        self._files = _OpenFiles()
        channels, scale = manifest.latent_channels, manifest.latent_scale
        self._channels, self._scale = channels, scale
        self._latent_names = LATENT_NAMES[manifest.posterior]

    @classmethod
    def open(cls, path: str | Path, generation: str | None = None) -> ShardSet:
        """Open the newest generation, or a named one (`manifest-<hash>.json`).

        Raises InputError when there is no set at `path` or it needs a newer version, ShardError
        when a file of it is missing or not what the manifest says.
        """
        folder = Path(path)
        return cls.of_manifest(folder, *load_manifest(folder, generation or MANIFEST))

    @classmethod
    def of_manifest(cls, folder: Path, manifest: Manifest, generation: str) -> ShardSet:
        """Open what a manifest lists; it may be one that is yet to be published."""
        parts = []
        for index, entry in enumerate(manifest.shards):
            check_length(folder / entry.tar.name, entry.tar.bytes)
            parts.append(_table(folder, manifest, index))
        table = join_tables(parts)
        retired = read_retired(folder, manifest)
        if retired:
            live = (sample not in retired for sample in table.sample_id)
            table = table.take(np.fromiter(live, np.bool_, len(table)))
        if twins := table.repeated():
            first, second = (manifest.shards[table.shard[row]].tar.name for row in sorted(twins))
            raise ShardError(
                f"{folder}: sample {table.sample_id[twins[0]]} stands in {first} and in {second}; "
                "copy the set again from its source"
            )
        return cls(folder, manifest, generation, table)

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

    def read_bytes(self, row: int) -> tuple[bytearray, bytearray]:
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
        data = read_listed(self.folder, entry)
        shape = unconditional_shape(data, self.manifest.text_width, entry.name)
        tensors = decode_tensors(data, shape, None, entry.name)
        return tensors["prompt_embeds.0"], tensors["prompt_mask.0"]

    def rgb_map(self) -> RgbMap | None:
        """The linear map from latents to RGB, None when the set has none. Imports no torch."""
        return read_rgb(self.folder, self.manifest)

    def preview_prompts(self) -> list[PreviewPrompt]:
        """The prompts that previews draw, with their embeddings; empty when the set has none."""
        return read_previews(self.folder, self.manifest)

    def where(self, row: int) -> str:
        tar = self.manifest.shards[int(self.table.shard[row])].tar.name
        return f"{self.folder / tar}, sample {self.table.sample_id[row]}"

    def _member(self, row: int, member: int) -> bytearray:
        table = self.table
        entry = self.manifest.shards[int(table.shard[row])].tar
        offset, size = int(table.member_offsets[row, member]), int(table.member_bytes[row, member])
        data = self._files.read(self.folder / entry.name, entry.bytes, offset, size)
        found = sha256_hex(data)
        if found != table.member_sha256[row, member].tobytes().hex():
            raise ShardError(
                f"{self.where(row)}: damaged ({len(data)} of {size} bytes, sha256 {found[:12]}); "
                "copy the shard again from its source, or delete it and run precompute again"
            )
        return data

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _table(folder: Path, manifest: Manifest, index: int) -> SampleTable:
    """One shard's rows, its sidecar checked against the manifest."""
    entry = manifest.shards[index]
    what = str(folder / entry.sidecar.name)
    fingerprint, table = decode_table(read_listed(folder, entry.sidecar), what, index)
    if fingerprint.hash != manifest.fingerprint.hash:
        lines = fingerprint_difference(manifest.fingerprint, fingerprint)
        raise ShardError(
            f"{folder / entry.tar.name} was made with other encoders than the manifest says "
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


class _OpenFiles:
    """Tars open for positional reads, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._readers: dict[int, int] = {}  # descriptor -> reads under way
        self._most = OPEN_FILES
        self._lock = threading.Lock()

    def read(self, path: Path, length: int, offset: int, size: int) -> bytearray:
        descriptor = self._borrow(path, length)
        try:
            return _read_at(descriptor, offset, size)
        finally:
            with self._lock:
                self._readers[descriptor] -= 1
                self._close_surplus()

    def _borrow(self, path: Path, length: int) -> int:
        with self._lock:
            if self._most == 0:
                raise ValueError(f"{path.parent}: this shard set was closed")
            descriptor = self._open.pop(path, None)
            if descriptor is None:
                check_length(path, length)
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._open[path] = descriptor
            self._readers[descriptor] = self._readers.get(descriptor, 0) + 1
            return descriptor

    def _close_surplus(self) -> None:
        """Close the oldest files that nobody reads, until few enough are open."""
        surplus = len(self._open) - self._most
        idle = [path for path, descriptor in self._open.items() if not self._readers[descriptor]]
        for path in idle[: max(surplus, 0)]:
            descriptor = self._open.pop(path)
            del self._readers[descriptor]
            os.close(descriptor)

    def close(self) -> None:
        """Close what nobody reads; a read under way closes its file when it ends."""
        with self._lock:
            self._most = 0
            self._close_surplus()


_seek_lock = threading.Lock()  # where there is no pread, a file's position is shared


def _read_at(descriptor: int, offset: int, size: int) -> bytearray:
    """`size` bytes, or fewer at the end of the file: the one buffer that is hashed and decoded."""
    data = bytearray(size)
    if not hasattr(os, "preadv"):  # Windows
        with _seek_lock, os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(offset)
            del data[file.readinto(data) :]
            return data
    done = 0
    with memoryview(data) as view:
        while done < size and (more := os.preadv(descriptor, [view[done:]], offset + done)):
            done += more
    del data[done:]
    return data
