"""The sidecar of a shard: one column a fact, one row a sample, so that a plan reads no tar.

Hashes stand as hex strings; offsets are of a member's data in the tar, in bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen_lora.errors import ShardError
from qwen_lora.hashing import canonical_json, hash_json
from qwen_lora.shards.format import FORMAT_MAJOR, FORMAT_MINOR, Fingerprint
from qwen_lora.shards.safe import parse_json

SIDECAR_MAX_BYTES = 512 << 20
MEMBERS = ("json", "safetensors")  # in tar order
BLOCK = 512  # of a tar
TAR_RECORD = 20 * BLOCK  # a tar's length is a multiple of this


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


def padded(size: int) -> int:
    """A member's length in whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def canonical_header(name: str, size: int) -> bytes:
    """The 512 bytes that a member's header must be: plain file, mode 644, nobody, time 0."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT)


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
    """Raises ShardError when a column is missing, too short, or does not make sense."""
    value = parse_json(data, what, SIDECAR_MAX_BYTES)
    try:
        if value["format"][0] != FORMAT_MAJOR:
            raise ShardError(f"{what}: format {value['format']} needs another version of qwen-lora")
        fingerprint = Fingerprint(**value["fingerprint"])
        rows = tuple(_rows(value["columns"]))
        sidecar = Sidecar(fingerprint, dict(value["made_by"]), rows)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ShardError(f"{what}: not a sidecar of format {FORMAT_MAJOR} ({error!r})") from None
    _check_rows(sidecar.rows, what)
    return sidecar


def _rows(columns: dict[str, list[Any]]) -> Iterator[SidecarRow]:
    names = ["sample_id", "latent_id", "text_ids", "source_sha256", "group", "bucket"]
    names += ["token_counts"]
    names += [f"{name}_{fact}" for name in MEMBERS for fact in ("offset", "bytes", "sha256")]
    for values in zip(*(columns[name] for name in names), strict=True):
        sample, latent, texts, source, group, bucket, tokens, *facts = values
        if not (isinstance(group, str) and len(bucket) == 2 and len(texts) == len(tokens) > 0):
            raise ValueError(f"row of sample {sample}")
        yield SidecarRow(
            _hex(sample, 32),
            _hex(latent, 64),
            tuple(_hex(text, 64) for text in texts),
            _hex(source, 64),
            group,
            (_natural(bucket[0]), _natural(bucket[1])),
            tuple(_natural(count) for count in tokens),
            MemberEntry(_natural(facts[0]), _natural(facts[1]), _hex(facts[2], 64)),
            MemberEntry(_natural(facts[3]), _natural(facts[4]), _hex(facts[5], 64)),
        )


def _check_rows(rows: Sequence[SidecarRow], what: str) -> None:
    """Sample ids ascend, and members follow each other as the writer lays them out."""
    position, last = 0, ""
    for row in rows:
        if row.sample_id <= last:
            raise ShardError(f"{what}: sample {row.sample_id} is out of order or stands twice")
        if row.sample_id != hash_json([row.latent_id, list(row.text_ids)])[:32]:
            raise ShardError(f"{what}: sample id {row.sample_id} is not that of its contents")
        for entry in (row.json, row.safetensors):
            if entry.offset != position + BLOCK:
                raise ShardError(f"{what}: sample {row.sample_id} does not follow the one before")
            position = entry.offset + padded(entry.bytes)
        last = row.sample_id


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is not a count")
    return value


def _hex(value: Any, digits: int) -> str:
    if not isinstance(value, str) or len(value) != digits or value.strip("0123456789abcdef"):
        raise ValueError(f"{value!r} is not {digits} hex digits")
    return value
