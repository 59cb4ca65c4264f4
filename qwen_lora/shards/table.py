"""A shard set's live samples as columns: what planning and reading need, small for a million."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from qwen_lora.shards.safe import JSON_MEMBER_MAX_BYTES
from qwen_lora.shards.tar import BLOCK, MEMBERS, padded

_SIDE_MAX = 1 << 20  # pixels
_TOKENS_MAX = 1 << 24
_MEMBER_MAX_BYTES = 1 << 40


class HexColumn(Sequence[str]):
    """Hashes held as bytes, read as hex strings."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data  # [N, bytes] uint8

    @classmethod
    def of(cls, values: Sequence[str], digits: int) -> HexColumn:
        """Raises ValueError or TypeError unless each value is `digits` lower-case hex digits."""
        text = "".join(values)
        if set(map(len, values)) - {digits} or (raw := bytes.fromhex(text)).hex() != text:
            raise ValueError(f"a hash is not {digits} hex digits")
        return cls(np.frombuffer(raw, np.uint8).reshape(-1, digits // 2))

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

    @property
    def end(self) -> int:
        """Where the last member ends, with its padding; of one shard's whole table."""
        if not len(self):
            return 0
        return int(self.member_offsets[-1, 1]) + padded(int(self.member_bytes[-1, 1]))

    def take(self, keep: NDArray[np.bool_]) -> SampleTable:
        """The rows where `keep` [N] holds."""
        counts = np.diff(self.token_offsets)
        return SampleTable(
            sample_id=HexColumn(self.sample_id.data[keep]),
            latent_id=HexColumn(self.latent_id.data[keep]),
            source_sha256=HexColumn(self.source_sha256.data[keep]),
            group=[self.group[row] for row in np.flatnonzero(keep)],
            bucket=self.bucket[keep],
            shard=self.shard[keep],
            token_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[keep])]),
            token_counts=self.token_counts[np.repeat(keep, counts)],
            member_offsets=self.member_offsets[keep],
            member_bytes=self.member_bytes[keep],
            member_sha256=self.member_sha256[keep],
        )

    def repeated(self) -> tuple[int, int] | None:
        """Two rows with the same sample id, if there are any."""
        words = np.ascontiguousarray(self.sample_id.data).view("<u8").reshape(-1, 2)
        halves = np.sort(words[:, 0])
        if not (halves[1:] == halves[:-1]).any():  # a million ids are sorted in a tenth of the time
            return None
        order = np.lexsort((words[:, 1], words[:, 0]))
        ordered = words[order]
        same = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1))
        return (int(order[same[0]]), int(order[same[0] + 1])) if len(same) else None


def table_of_columns(columns: dict[str, Any], shard: int) -> SampleTable:
    """One sidecar's columns, checked: types, ranges, order, and that members follow each other.

    Whole columns are checked at once, since a million samples are to open within seconds. Raises
    ValueError, TypeError, KeyError or OverflowError for columns that no writer makes.
    """
    names, groups = columns["sample_id"], columns["group"]
    if not all(map(operator.lt, names, names[1:])):
        raise ValueError("sample ids do not ascend")
    if not isinstance(groups, list) or set(map(type, groups)) - {str}:
        raise ValueError("a group that is no text")
    tokens, texts = _lists(columns["token_counts"]), _lists(columns["text_ids"])
    counts = list(map(len, tokens))
    if counts != list(map(len, texts)) or (counts and not min(counts)):
        raise ValueError("captions of a sample differ in number, or there are none")
    buckets = _lists(columns["bucket"])
    if set(map(len, buckets)) - {2}:
        raise ValueError("a bucket is not [height, width]")
    sizes = [_numbers(columns[f"{name}_bytes"], 1, _MEMBER_MAX_BYTES) for name in MEMBERS]
    offsets = [_numbers(columns[f"{name}_offset"], 0, 1 << 62) for name in MEMBERS]
    hashes = [HexColumn.of(columns[f"{name}_sha256"], 64).data for name in MEMBERS]
    table = SampleTable(
        sample_id=HexColumn.of(names, 32),
        latent_id=HexColumn.of(columns["latent_id"], 64),
        source_sha256=HexColumn.of(columns["source_sha256"], 64),
        group=list(map(sys.intern, groups)),
        bucket=_numbers(list(chain(*buckets)), 1, _SIDE_MAX).astype(np.int32).reshape(-1, 2),
        shard=np.full(len(names), shard, np.int32),
        token_offsets=np.cumsum([0, *counts], dtype=np.int64),
        token_counts=_numbers(list(chain(*tokens)), 1, _TOKENS_MAX).astype(np.int32),
        member_offsets=np.stack(offsets, axis=1),
        member_bytes=np.stack(sizes, axis=1),
        member_sha256=np.stack(hashes, axis=1),
    )
    # np.stack has seen to equal lengths inside the member columns.
    lengths = {
        *(len(table.latent_id), len(table.source_sha256), len(groups), len(buckets), len(tokens)),
        *(len(table.member_bytes), len(table.member_offsets), len(table.member_sha256)),
    }
    if lengths != {len(table)}:
        raise ValueError("columns differ in length")
    _check_layout(table)
    return table


def _check_layout(table: SampleTable) -> None:
    """Members stand as the writer lays them out, one behind the other."""
    sizes = table.member_bytes.reshape(-1)
    if len(table) and int(table.member_bytes[:, 0].max()) > JSON_MEMBER_MAX_BYTES:
        raise ValueError("a JSON member is longer than the format allows")
    ends = np.cumsum(BLOCK + -(-sizes // BLOCK) * BLOCK)
    begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    if (table.member_offsets.reshape(-1) != begins + BLOCK).any():
        raise ValueError("members do not follow each other")


def _lists(values: Any) -> list[list[Any]]:
    if not isinstance(values, list) or set(map(type, values)) - {list}:
        raise ValueError("a column is not a list of lists")
    return values


def _numbers(values: Any, low: int, high: int) -> NDArray[np.int64]:
    """Plain integers of [low, high)."""
    if not isinstance(values, list) or set(map(type, values)) - {int}:
        raise ValueError("a column is not a list of integers")
    array = np.array(values, np.int64)
    if ((array < low) | (array >= high)).any():
        raise ValueError(f"a number is not from {low} to {high - 1}")
    return array


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
