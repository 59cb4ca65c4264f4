"""A shard set's live samples as columns: what planning and reading need, small for a million."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from qwen_lora.shards.sidecar import MEMBERS, SidecarRow


class HexColumn(Sequence[str]):
    """Hashes held as bytes, read as hex strings."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data  # [N, bytes] uint8

    @classmethod
    def of(cls, values: Sequence[str], digits: int) -> HexColumn:
        flat = np.frombuffer(bytes.fromhex("".join(values)), np.uint8)
        return cls(flat.reshape(-1, digits // 2))

    @classmethod
    def join(cls, parts: Sequence[HexColumn], digits: int) -> HexColumn:
        empty = np.zeros((0, digits // 2), np.uint8)
        return cls(np.concatenate([empty, *(part.data for part in parts)]))

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> HexColumn: ...

    def __getitem__(self, row: int | slice) -> str | HexColumn:
        if isinstance(row, slice):
            return HexColumn(self.data[row])
        value: bytes = self.data[row].tobytes()
        return value.hex()

    def __iter__(self) -> Iterator[str]:
        digits = 2 * self.data.shape[1]
        text = self.data.tobytes().hex()
        return (text[start : start + digits] for start in range(0, len(text), digits))


@dataclass(frozen=True)
class SampleTable:
    """One row a live sample, in the order of shards and of their rows."""

    sample_id: HexColumn
    latent_id: HexColumn
    source_sha256: HexColumn
    group: list[str]
    bucket: NDArray[np.int32]  # [N, 2], height and width in pixels
    shard: NDArray[np.int32]  # [N], index into manifest.shards
    token_offsets: NDArray[np.int64]  # [N + 1], where a sample's token_counts begin
    token_counts: NDArray[np.int32]  # [captions], T of each
    member_offsets: NDArray[np.int64]  # [N, 2], of json and safetensors data in the tar
    member_bytes: NDArray[np.int64]  # [N, 2]
    member_sha256: NDArray[np.uint8]  # [N, 2, 32]

    def __len__(self) -> int:
        return len(self.sample_id)

    def tokens_of(self, row: int) -> tuple[int, ...]:
        begin, end = self.token_offsets[row], self.token_offsets[row + 1]
        return tuple(self.token_counts[begin:end].tolist())


def table_of_rows(rows: Sequence[SidecarRow], shard: int) -> SampleTable:
    """One shard's live rows as columns."""
    members = [[getattr(row, name) for name in MEMBERS] for row in rows]
    counts = [len(row.token_counts) for row in rows]
    hashes = HexColumn.of([entry.sha256 for pair in members for entry in pair], 64)
    return SampleTable(
        sample_id=HexColumn.of([row.sample_id for row in rows], 32),
        latent_id=HexColumn.of([row.latent_id for row in rows], 64),
        source_sha256=HexColumn.of([row.source_sha256 for row in rows], 64),
        group=[sys.intern(row.group) for row in rows],
        bucket=np.array([row.bucket for row in rows], np.int32).reshape(-1, 2),
        shard=np.full(len(rows), shard, np.int32),
        token_offsets=np.cumsum([0, *counts], dtype=np.int64),
        token_counts=np.array([n for row in rows for n in row.token_counts], np.int32),
        member_offsets=np.array(
            [[entry.offset for entry in pair] for pair in members], np.int64
        ).reshape(-1, 2),
        member_bytes=np.array(
            [[entry.bytes for entry in pair] for pair in members], np.int64
        ).reshape(-1, 2),
        member_sha256=hashes.data.reshape(-1, 2, 32),
    )


def join_tables(parts: Sequence[SampleTable]) -> SampleTable:
    offsets: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    before = 0
    for part in parts:  # a shard whose samples are all retired has no row
        offsets.append(part.token_offsets[1:] + before)
        before += int(part.token_offsets[-1])

    def stack(name: str, shape: tuple[int, ...], dtype: type) -> NDArray[np.generic]:
        return np.concatenate([np.zeros((0, *shape), dtype), *(getattr(p, name) for p in parts)])

    return SampleTable(
        sample_id=HexColumn.join([part.sample_id for part in parts], 32),
        latent_id=HexColumn.join([part.latent_id for part in parts], 64),
        source_sha256=HexColumn.join([part.source_sha256 for part in parts], 64),
        group=[group for part in parts for group in part.group],
        bucket=stack("bucket", (2,), np.int32),  # type: ignore[arg-type]
        shard=stack("shard", (), np.int32),  # type: ignore[arg-type]
        token_offsets=np.concatenate(offsets),
        token_counts=stack("token_counts", (), np.int32),  # type: ignore[arg-type]
        member_offsets=stack("member_offsets", (2,), np.int64),  # type: ignore[arg-type]
        member_bytes=stack("member_bytes", (2,), np.int64),  # type: ignore[arg-type]
        member_sha256=stack("member_sha256", (2, 32), np.uint8),  # type: ignore[arg-type]
    )
