"""Shards of this run beside a generation that somebody else has published meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from qwen_lora.errors import ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.shards.copy import RawRecord, write_records
from qwen_lora.shards.format import ShardEntry
from qwen_lora.shards.manifest import read_sidecar
from qwen_lora.shards.sidecar import MemberEntry, SidecarRow
from qwen_lora.shards.store import Store


def without_stored(
    store: Store, new: Iterable[ShardEntry], existing: ExistingSet
) -> list[ShardEntry]:
    """`new` without the samples that `existing` has, for a sample stands in a set once.

    A shard that holds some of them is written anew without them, tensors not decoded.
    """
    listed = {entry.tar.name for entry in existing.shards}
    kept = []
    for entry in new:
        if entry.tar.name in listed:
            continue
        sidecar = read_sidecar(store, entry)
        rows = [row for row in sidecar.rows if row.sample_id not in existing.sources]
        if len(rows) == len(sidecar.rows):
            kept.append(entry)
        elif rows:
            with store.open(entry.tar) as file:
                records = _records(file, rows, store.where(entry.tar.name))
                kept.append(
                    write_records(store, records, sidecar.fingerprint, dict(sidecar.made_by))
                )
    return kept


def _records(file: BinaryIO, rows: Sequence[SidecarRow], what: str) -> Iterator[RawRecord]:
    for row in rows:
        yield RawRecord(row, _member(file, row.json, what), _member(file, row.safetensors, what))


def _member(file: BinaryIO, entry: MemberEntry, what: str) -> bytes:
    file.seek(entry.offset)
    data = file.read(entry.bytes)
    if sha256_hex(data) != entry.sha256:
        raise ShardError(f"{what} is damaged at byte {entry.offset}; run the same command again")
    return data
