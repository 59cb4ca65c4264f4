"""Reading shard sets: every byte that is decoded was hashed in the very buffer that is decoded."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qwen_lora.errors import InputError, ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import Manifest, RecordMeta
from qwen_lora.shards.manifest import (
    MANIFEST,
    load_manifest,
    read_listed,
    read_retired,
    read_sidecar,
)
from qwen_lora.shards.record import (
    LATENT_NAMES,
    Record,
    RecordShape,
    decode_meta,
    decode_tensors,
)
from qwen_lora.shards.safe import parse_tensor_header
from qwen_lora.shards.table import SampleTable, join_tables, table_of_rows

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
        if "://" in str(path):
            raise InputError(
                f"{path}: remote shard sets are not supported yet; copy it to a folder"
            )
        folder = Path(path)
        manifest, name = load_manifest(folder, generation or MANIFEST)
        retired = read_retired(folder, manifest)
        parts: list[SampleTable] = []
        seen: dict[str, int] = {}  # sample id -> shard
        for index, entry in enumerate(manifest.shards):
            _check_length(folder / entry.tar.name, entry.tar.bytes)
            sidecar = read_sidecar(folder, entry)
            if sidecar.fingerprint.hash != manifest.fingerprint.hash:
                raise ShardError(
                    f"{folder / entry.tar.name} was made with other encoders than the manifest "
                    "says; run precompute again into a new folder"
                )
            rows = [row for row in sidecar.rows if row.sample_id not in retired]
            for row in rows:
                if seen.setdefault(row.sample_id, index) != index:
                    other = manifest.shards[seen[row.sample_id]].tar.name
                    raise ShardError(
                        f"sample {row.sample_id} stands in {other} and in {entry.tar.name}"
                    )
            parts.append(table_of_rows(rows, index))
        return cls(folder, manifest, name, join_tables(parts))

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

    def read_bytes(self, row: int) -> tuple[bytes, bytes]:
        """The JSON and safetensors members of a row, hashes checked. Raises ShardError."""
        meta, tensors = self._member(row, 0), self._member(row, 1)
        return meta, tensors

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
        entries = parse_tensor_header(data, entry.name)
        tokens = entries["prompt_embeds.0"].shape[0] if "prompt_embeds.0" in entries else 0
        expected = RecordShape((), (0, 0, 0), (tokens,), self.manifest.text_width)
        tensors = decode_tensors(data, expected, None, entry.name)
        return tensors["prompt_embeds.0"], tensors["prompt_mask.0"]

    def where(self, row: int) -> str:
        tar = self.manifest.shards[int(self.table.shard[row])].tar.name
        return f"{self.folder / tar}, sample {self.table.sample_id[row]}"

    def _member(self, row: int, member: int) -> bytes:
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


def _check_length(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; copy it again from its source") from None
    if found != expected:
        raise ShardError(
            f"{path} has {found} bytes, the manifest says {expected}; copy it again from its source"
        )


class _OpenFiles:
    """Tars open for positional reads, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._busy: dict[int, int] = {}  # descriptor -> readers
        self._lock = threading.Lock()

    def read(self, path: Path, length: int, offset: int, size: int) -> bytes:
        if offset + size > length:
            raise ShardError(f"{path}: a member ends at {offset + size}, the shard at {length}")
        descriptor = self._borrow(path, length)
        try:
            return _read_at(descriptor, offset, size)
        finally:
            self._give_back(descriptor)

    def _borrow(self, path: Path, length: int) -> int:
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is None:
                _check_length(path, length)
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._open[path] = descriptor
            self._busy[descriptor] = self._busy.get(descriptor, 0) + 1
            return descriptor

    def _give_back(self, descriptor: int) -> None:
        with self._lock:
            self._busy[descriptor] -= 1
            if len(self._open) > OPEN_FILES:
                self._close_idle(len(self._open) - OPEN_FILES)

    def _close_idle(self, count: int) -> None:
        idle = [path for path, descriptor in self._open.items() if not self._busy[descriptor]]
        for path in idle[:count]:
            descriptor = self._open.pop(path)
            del self._busy[descriptor]
            os.close(descriptor)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
            self._busy.clear()


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the file."""
    if not hasattr(os, "pread"):  # Windows
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(offset)
            return file.read(size)
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
