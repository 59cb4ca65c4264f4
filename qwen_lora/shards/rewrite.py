"""Some records of some shards, written into new shards as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_lora.shards.check import check_record, expected_shape
from qwen_lora.shards.copy import RawRecord, join_made_by, write_records
from qwen_lora.shards.cut import MAX_SHARD_BYTES, cut_by_size
from qwen_lora.shards.format import RecordMeta, ShardEntry
from qwen_lora.shards.manifest import read_sidecar
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import decode_meta, encode_meta
from qwen_lora.shards.sidecar import SidecarRow
from qwen_lora.shards.store import Store
from qwen_lora.shards.tar import BLOCK


@dataclass
class Part:
    """What is wanted of one shard."""

    shards: ShardSet
    index: int  # into its manifest's shards
    rows: NDArray[np.int64]  # wanted rows of its table

    @property
    def entry(self) -> ShardEntry:
        return self.shards.manifest.shards[self.index]

    def sizes(self) -> list[int]:
        """Bytes of each wanted record in a tar, headers and padding included."""
        members = self.shards.table.member_bytes[self.rows]
        sizes: list[int] = (BLOCK - members // -BLOCK * BLOCK).sum(axis=1).tolist()
        return sizes


def shard_rows(shards: ShardSet) -> Iterator[tuple[int, range]]:
    """Every shard's index, and the rows of its live samples in the set's table."""
    count = len(shards.manifest.shards)
    bounds = np.searchsorted(shards.table.shard, np.arange(count + 1)).tolist()
    for index in range(count):
        yield index, range(bounds[index], bounds[index + 1])


@dataclass(frozen=True)
class _Wanted:
    shards: ShardSet
    table_row: int
    row: SidecarRow
    made_by: dict[str, Any]  # one object a shard


def rewrite(
    store: Store,
    parts: Sequence[Part],
    max_samples: int,
    change: Callable[[RecordMeta], RecordMeta] | None = None,
) -> Iterator[ShardEntry]:
    """Publish the wanted records in new shards, in the order of `parts`, ids ascending in each.

    Every record's hashes are checked and its ids recomputed; `change` makes another JSON member.
    Cut by the sizes that records have before it. Raises ShardError for a damaged record.
    """
    sizes = [size for part in parts for size in part.sizes()]
    wanted = _wanted(parts)
    for cut in cut_by_size(sizes, max_bytes=MAX_SHARD_BYTES, max_samples=max_samples):
        some = sorted(islice(wanted, len(cut)), key=lambda each: each.row.sample_id)
        made_by = {id(each.made_by): each.made_by for each in some}
        yield write_records(
            store,
            (_record(each, change) for each in some),
            some[0].shards.manifest.fingerprint,
            join_made_by(made_by.values()),
        )


def _wanted(parts: Sequence[Part]) -> Iterator[_Wanted]:
    for part in parts:
        sidecar = read_sidecar(part.shards.store, part.entry)
        table = part.shards.table
        rows = {table.sample_id[row]: row for row in part.rows.tolist()}
        for row in sidecar.rows:
            if row.sample_id in rows:
                yield _Wanted(part.shards, rows[row.sample_id], row, sidecar.made_by)


def _record(wanted: _Wanted, change: Callable[[RecordMeta], RecordMeta] | None) -> RawRecord:
    shards, row = wanted.shards, wanted.row
    facts, tensors = shards.read_bytes(wanted.table_row)
    what = shards.where(wanted.table_row)
    expected = expected_shape(shards.manifest, row)
    check_record(row, facts, tensors, shards.manifest.fingerprint, expected, what)
    if change is None:
        return RawRecord(row, facts, tensors)
    return RawRecord(row, encode_meta(change(decode_meta(facts, what))), tensors)
