"""Records from set to set as they are: bytes checked on the way, tensors never decoded. No torch.

What a tool writes goes through here, so that merged and compacted shards are laid out as the
writer's own: canonical headers, members in order, zero padding, one end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, BinaryIO

from qwen_lora.errors import QwenLoraError, ShardError
from qwen_lora.hashing import CHUNK_BYTES, canonical_json, sha256_hex
from qwen_lora.posix import exclusive_lock, temporary_file
from qwen_lora.shards.check import check_record, expected_shape, scan_tar
from qwen_lora.shards.format import FileEntry, Fingerprint, Manifest, ShardEntry
from qwen_lora.shards.manifest import content_name, read_sidecar
from qwen_lora.shards.sidecar import MemberEntry, Sidecar, SidecarRow
from qwen_lora.shards.store import Store
from qwen_lora.shards.tar import MEMBERS, canonical_header, padded, tar_bytes
from qwen_lora.shards.writer import (
    TEMPORARY,
    HashingFile,
    publish_sidecar,
    sidecar_bytes,
    sweep_temporaries,
)


@contextmanager
def changing(store: Store) -> Iterator[None]:
    """Hold a set's lock on this machine while it is changed, with what killed runs left swept away.

    Raises InputError when another process has the lock or the store can only be read; an OSError of
    the block, a full disk for one, becomes a QwenLoraError in one line.
    """
    store.check_writable()
    try:
        with exclusive_lock(store.scratch / "lock", f"the shard set {store.label}"):
            sweep_temporaries(store)
            yield
    except OSError as error:
        raise QwenLoraError(
            f"cannot write to {store.label}: {error.strerror or error}; the set is as it was, the "
            "same command continues once it is put right"
        ) from error


# ---- records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawRecord:
    """A record's members; of `row` all but the members' places are taken over."""

    row: SidecarRow
    json: bytes | memoryview
    safetensors: bytes | memoryview


def write_records(
    store: Store, records: Iterable[RawRecord], fingerprint: Fingerprint, made_by: dict[str, Any]
) -> ShardEntry:
    """Publish a shard of records in sample-id order, at least one, and its sidecar."""
    rows: list[SidecarRow] = []
    with temporary_file(store.scratch, TEMPORARY) as (file, path):
        hashed = HashingFile(file)
        for record in records:
            rows.append(_write_record(hashed, record))
        if not rows:
            raise ValueError("a shard needs at least one sample")
        hashed.write(b"\0" * (tar_bytes(hashed.position) - hashed.position))
    sha256 = hashed.digest.hexdigest()
    tar = FileEntry(content_name("shard", sha256, ".tar"), hashed.position, sha256)
    sidecar = Sidecar(fingerprint, made_by, tuple(rows))
    try:
        name = content_name("shard", sha256, ".json")
        data = sidecar_bytes(store, name, sidecar)
    except BaseException:
        path.unlink()
        raise
    store.publish(path, tar)
    return ShardEntry(tar, publish_sidecar(store, name, sidecar, data), len(rows))


def _write_record(file: HashingFile, record: RawRecord) -> SidecarRow:
    entries: dict[str, Any] = {}
    for name in MEMBERS:
        data: bytes | memoryview = getattr(record, name)
        file.write(canonical_header(f"{record.row.sample_id}.{name}", len(data)))
        entries[name] = MemberEntry(file.position, len(data), sha256_hex(data))
        file.write(data)
        file.write(b"\0" * (padded(len(data)) - len(data)))
    return replace(record.row, **entries)


def join_made_by(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What made the records of a shard that come from several: facts that differ are listed."""
    values: dict[str, dict[bytes, Any]] = {}
    for part in parts:
        for key, value in part.items():
            for each in value if isinstance(value, list) else [value]:
                values.setdefault(key, {})[canonical_json(each)] = each
    return {
        key: next(iter(found.values())) if len(found) == 1 else [found[k] for k in sorted(found)]
        for key, found in values.items()
    }


# ---- whole shards --------------------------------------------------------------------------------


def copy_shard(source: Store, manifest: Manifest, entry: ShardEntry, target: Store) -> ShardEntry:
    """Publish a shard of `source` in `target` under the same name, every byte and record checked.

    Raises ShardError when it is not what the manifest and its sidecar say.
    """
    sidecar = read_sidecar(source, entry)
    if not _has(target, entry.tar):
        _copy_tar(source, manifest, entry, sidecar, target)
    data = sidecar_bytes(target, entry.sidecar.name, sidecar)
    return replace(entry, sidecar=publish_sidecar(target, entry.sidecar.name, sidecar, data))


def _copy_tar(
    source: Store, manifest: Manifest, entry: ShardEntry, sidecar: Sidecar, target: Store
) -> None:
    def check(row: SidecarRow, facts: bytes, tensors: bytes) -> None:
        what = f"{source.where(entry.tar.name)}, sample {row.sample_id}"
        expected = expected_shape(manifest, row)
        check_record(row, facts, tensors, manifest.fingerprint, expected, what)

    with temporary_file(target.scratch, TEMPORARY) as (file, path):
        with source.open(entry.tar) as opened:
            where = source.where(entry.tar.name)
            copying: Any = _Copying(opened, file)
            sha256, _, problems = scan_tar(copying, where, sidecar.rows, check)
        if sha256 != entry.tar.sha256 and not problems:
            problems = [f"{where} is damaged: sha256 {sha256[:12]}"]
        if problems:
            raise ShardError(f"{problems[0]}; copy the shard again from its source")
    target.publish(path, entry.tar, resumed=True)


def _has(store: Store, tar: FileEntry) -> bool:
    """Whether an earlier run has put a tar there; a remote store finds out when it publishes."""
    if store.is_remote:
        return False
    try:
        with store.open_unlisted(tar.name, tar.bytes) as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except (ShardError, OSError):
        return False
    return digest.hexdigest() == tar.sha256


class _Copying:
    """A file being read front to back, with all that is read written to another."""

    def __init__(self, source: BinaryIO, target: IO[bytes]) -> None:
        self._source, self._target = source, target

    def read(self, size: int) -> bytes:
        """As many bytes as are asked for, short only at the end."""
        data = b""
        while len(data) < size and (more := self._source.read(size - len(data))):
            data = data + more if data else more
        self._target.write(data)
        return data

    def tell(self) -> int:
        return self._source.tell()

    def fileno(self) -> int:
        return self._source.fileno()
