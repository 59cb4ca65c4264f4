"""The sidecar of a shard: one column a fact, one row a sample, so that a plan reads no tar.

Hashes stand as hex strings; offsets are of a member's data in the tar, in bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from qwen_lora.errors import ShardError
from qwen_lora.hashing import canonical_json
from qwen_lora.shards.format import FORMAT_MAJOR, FORMAT_MINOR, Fingerprint, sample_id
from qwen_lora.shards.safe import parse_json
from qwen_lora.shards.table import HexColumn, SampleTable, table_of_columns
from qwen_lora.shards.tar import MEMBERS, padded

SIDECAR_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class MemberEntry:
    """Where one member's data is in the tar, and what it must be."""

    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SidecarRow:
    """One sample's facts."""

    sample_id: str
    latent_id: str
    text_ids: tuple[str, ...]
    source_sha256: str
    group: str
    bucket: tuple[int, int]  # [height, width] pixels
    token_counts: tuple[int, ...]  # T_i, one a caption
    json: MemberEntry
    safetensors: MemberEntry

    @property
    def end(self) -> int:
        """First byte behind the record, with its padding."""
        return self.safetensors.offset + padded(self.safetensors.bytes)


@dataclass(frozen=True)
class Sidecar:
    fingerprint: Fingerprint
    made_by: dict[str, Any]  # versions and settings that the bytes depend on; informative
    rows: tuple[SidecarRow, ...]


def encode_sidecar(sidecar: Sidecar) -> bytes:
    rows = sidecar.rows
    columns: dict[str, list[Any]] = {
        "sample_id": [row.sample_id for row in rows],
        "latent_id": [row.latent_id for row in rows],
        "text_ids": [list(row.text_ids) for row in rows],
        "source_sha256": [row.source_sha256 for row in rows],
        "group": [row.group for row in rows],
        "bucket": [list(row.bucket) for row in rows],
        "token_counts": [list(row.token_counts) for row in rows],
    }
    for name in MEMBERS:
        entries: list[MemberEntry] = [getattr(row, name) for row in rows]
        columns[f"{name}_offset"] = [entry.offset for entry in entries]
        columns[f"{name}_bytes"] = [entry.bytes for entry in entries]
        columns[f"{name}_sha256"] = [entry.sha256 for entry in entries]
    return canonical_json(
        {
            "format": [FORMAT_MAJOR, FORMAT_MINOR],
            "fingerprint": asdict(sidecar.fingerprint),
            "made_by": sidecar.made_by,
            "columns": columns,
        }
    )


def decode_sidecar(data: bytes, what: str) -> Sidecar:
    """Everything in a sidecar, row by row, with every sample id recomputed.

    Raises ShardError when a column is missing, too short, or does not make sense.
    """
    value, fingerprint = _decode(data, what)
    with _refused(what):
        columns = value["columns"]
        table = table_of_columns(columns, 0)
        rows = tuple(_rows(table, columns["text_ids"]))
        sidecar = Sidecar(fingerprint, dict(value["made_by"]), rows)
    for row in rows:
        if row.sample_id != sample_id(row.latent_id, list(row.text_ids)):
            raise ShardError(f"{what}: sample id {row.sample_id} is not that of its contents")
    return sidecar


def decode_table(data: bytes, what: str, shard: int) -> tuple[Fingerprint, SampleTable]:
    """What reading needs of a sidecar, without an object a sample. Raises ShardError."""
    with _collector_paused():
        value, fingerprint = _decode(data, what)
        with _refused(what):
            return fingerprint, table_of_columns(value["columns"], shard)


def _decode(data: bytes, what: str) -> tuple[dict[str, Any], Fingerprint]:
    value = parse_json(data, what, SIDECAR_MAX_BYTES)
    with _refused(what):
        if value["format"][0] != FORMAT_MAJOR:
            raise ShardError(f"{what}: format {value['format']} needs another version of qwen-lora")
        return value, decode_fingerprint(value["fingerprint"])


def decode_fingerprint(value: Any) -> Fingerprint:
    """Raises ValueError, TypeError or KeyError for anything that is no fingerprint."""
    fingerprint = Fingerprint(**value)
    sound = (
        isinstance(fingerprint.family, str)
        and isinstance(fingerprint.vae, dict)
        and isinstance(fingerprint.text, dict)
        and fingerprint.format_major == FORMAT_MAJOR
    )
    if not sound:
        raise ValueError("not a fingerprint")
    return fingerprint


@contextmanager
def _collector_paused() -> Iterator[None]:
    """JSON's lists hold no cycles, and the collector would walk them again and again: a quarter of
    the time that a large set takes to open."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn what a nonsensical sidecar raises into a ShardError."""
    try:
        yield
    except ShardError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ShardError(f"{what}: not a sidecar of format {FORMAT_MAJOR} ({error!r})") from None


def _rows(table: SampleTable, text_ids: list[list[str]]) -> Iterator[SidecarRow]:
    HexColumn.of([text for texts in text_ids for text in texts], 64)
    hashes = [HexColumn(table.member_sha256[:, member]) for member in range(len(MEMBERS))]
    columns = zip(
        table.sample_id,
        table.latent_id,
        text_ids,
        table.source_sha256,
        table.group,
        table.bucket.tolist(),
        table.member_offsets.tolist(),
        table.member_bytes.tolist(),
        zip(*hashes, strict=True),
        strict=True,
    )
    for row, (name, latent, texts, source, group, bucket, *members) in enumerate(columns):
        entries = [MemberEntry(*facts) for facts in zip(*members, strict=True)]
        yield SidecarRow(
            sample_id=name,
            latent_id=latent,
            text_ids=tuple(texts),
            source_sha256=source,
            group=group,
            bucket=(bucket[0], bucket[1]),
            token_counts=table.tokens_of(row),
            json=entries[0],
            safetensors=entries[1],
        )
