"""Publishing: shards, sidecars, the unconditional embedding, manifests. Whole or absent, always.

Everything is written to `.local/` first, fsynced, and then given its content name, which can only
replace equal bytes. The bytes depend on the samples alone: no clock, user, host or folder in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwen_lora.errors import ShardError
from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.posix import publish_file, temporary_file, write_atomic
from qwen_lora.shards.check import check_record, scan_tar
from qwen_lora.shards.format import FileEntry, Fingerprint, Manifest, RecordMeta, ShardEntry
from qwen_lora.shards.manifest import (
    MANIFEST,
    content_name,
    decode_manifest,
    encode_manifest,
    read_retired,
    read_sidecar,
    summarize_rows,
)
from qwen_lora.shards.previews import PreviewPrompt, RgbMap, encode_previews, encode_rgb
from qwen_lora.shards.record import encode_meta, encode_record
from qwen_lora.shards.safe import DTYPE_BYTES
from qwen_lora.shards.sidecar import (
    MemberEntry,
    Sidecar,
    SidecarRow,
    decode_sidecar,
    encode_sidecar,
)
from qwen_lora.shards.tar import BLOCK, MEMBERS, canonical_header, padded

if TYPE_CHECKING:
    import torch

LOCAL = ".local"
_TEMPORARY = "shard-part-"


@dataclass(frozen=True)
class EncodedSample:
    """A finished record on its way into a shard; tensors in stored dtypes, on the CPU."""

    sample_id: str
    latent_id: str
    text_ids: tuple[str, ...]
    token_counts: tuple[int, ...]
    meta: RecordMeta
    tensors: dict[str, torch.Tensor]


def predicted_record_bytes(
    meta: RecordMeta, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> int:
    """Exact bytes of a record in its tar, headers and padding included, before it is encoded.

    tensors: name -> (safetensors dtype, shape), as `RecordShape.tensors` gives them.
    """
    header: dict[str, Any] = {}
    position = 0
    # safetensors lays out by descending alignment, then by name.
    for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        size = DTYPE_BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    length = len(canonical_json(header))
    members = (len(encode_meta(meta)), 8 + -(-length // 8) * 8 + position)
    return sum(BLOCK + padded(size) for size in members)


# ---- shards --------------------------------------------------------------------------------------


def write_shard(
    folder: Path,
    samples: Iterable[EncodedSample],
    fingerprint: Fingerprint,
    made_by: dict[str, Any],
) -> ShardEntry:
    """Publish one shard and its sidecar. Samples come in sample-id order, at least one."""
    local = _local(folder)
    rows: list[SidecarRow] = []
    with temporary_file(local, _TEMPORARY) as (file, path):
        hashed = _HashingFile(file)
        _write_tar(hashed, samples, rows)
    if not rows:
        path.unlink()
        raise ValueError("a shard needs at least one sample")
    sha256 = hashed.digest.hexdigest()
    tar = FileEntry(content_name("shard", sha256, ".tar"), hashed.position, sha256)
    sidecar_name = content_name("shard", sha256, ".json")
    try:
        _check_layout(path, rows)
        data = _sidecar_bytes(folder / sidecar_name, Sidecar(fingerprint, made_by, tuple(rows)))
    except BaseException:
        path.unlink()
        raise
    publish_file(path, folder / tar.name)
    write_atomic(folder / sidecar_name, data, local)
    return ShardEntry(tar, FileEntry(sidecar_name, len(data), sha256_hex(data)), len(rows))


def _sidecar_bytes(path: Path, sidecar: Sidecar) -> bytes:
    """A new sidecar's bytes; those of the present one if it differs in `made_by` alone, because an
    older generation may list it by its hash."""
    data = encode_sidecar(sidecar)
    decode_sidecar(data, "new sidecar")  # what is published can be read: ids, order, layout
    if path.is_file():
        present = path.read_bytes()
        try:
            old = decode_sidecar(present, path.name)
        except ShardError:
            return data
        if (old.fingerprint.hash, old.rows) == (sidecar.fingerprint.hash, sidecar.rows):
            return present
    return data


def _write_tar(
    file: _HashingFile, samples: Iterable[EncodedSample], rows: list[SidecarRow]
) -> None:
    import webdataset as wds

    # encoder=False: bytes only, no pickling encoder can be reached. An integer mtime keeps PAX
    # headers out; with a float each member would carry one.
    writer = wds.TarWriter(
        file, encoder=False, mtime=0, user="", group="", mode=0o644, compress=False
    )
    begin = 0
    try:
        for sample in samples:
            members = dict(zip(MEMBERS, encode_record(sample.meta, sample.tensors), strict=True))
            writer.write({"__key__": sample.sample_id, **members})
            rows.append(_row(sample, members, begin))
            begin = rows[-1].end
    finally:
        writer.close()


def _check_layout(path: Path, rows: Sequence[SidecarRow]) -> None:
    """Raises ShardError unless webdataset laid the tar out as the sidecar says."""
    with open(path, "rb") as file:
        for row in rows:
            for name in MEMBERS:
                entry: MemberEntry = getattr(row, name)
                file.seek(entry.offset - BLOCK)
                if file.read(BLOCK) != canonical_header(f"{row.sample_id}.{name}", entry.bytes):
                    raise ShardError(
                        f"sample {row.sample_id}: this version of webdataset or Python writes tar "
                        "headers that the format does not allow"
                    )


def _row(sample: EncodedSample, members: dict[str, bytes], begin: int) -> SidecarRow:
    entries = {}
    for name, data in members.items():
        entries[name] = MemberEntry(begin + BLOCK, len(data), sha256_hex(data))
        begin += BLOCK + padded(len(data))
    return SidecarRow(
        sample_id=sample.sample_id,
        latent_id=sample.latent_id,
        text_ids=tuple(sample.text_ids),
        source_sha256=sample.meta.source_sha256,
        group=sample.meta.group,
        bucket=sample.meta.bucket,
        token_counts=tuple(sample.token_counts),
        json=entries["json"],
        safetensors=entries["safetensors"],
    )


class _HashingFile:
    """The file object that the tar is written to: counts and hashes on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The temporary is closed by its owner."""


def sweep_temporaries(folder: Path) -> int:
    """Remove what killed writers left in `.local/`; call it while holding the set's lock."""
    stale = [*_local(folder).glob(f"{_TEMPORARY}*.tmp"), *_local(folder).glob(".*.tmp")]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def adoptable_shards(
    folder: Path, fingerprint: Fingerprint, listed: frozenset[str] = frozenset()
) -> list[tuple[ShardEntry, Sidecar]]:
    """Whole shards with this fingerprint that are not among `listed` (tar names of a manifest).

    Each is checked whole: the tar against its name, every fact of the sidecar against the tar. A
    tar whose sidecar is missing, or that is damaged, is left alone; the same bytes come again under
    its name.
    """
    found = []
    for path in sorted(folder.glob("shard-*.tar")):
        side = path.with_suffix(".json")
        if path.name in listed or not side.is_file():
            continue
        data = side.read_bytes()
        try:
            sidecar = decode_sidecar(data, side.name)
        except ShardError:
            continue
        if not sidecar.rows or sidecar.fingerprint.hash != fingerprint.hash:
            continue
        sha256, length, problems = scan_tar(
            path, sidecar.rows, partial(_check_adopted, fingerprint, path.name)
        )
        if problems or path.name != content_name("shard", sha256, ".tar"):
            continue
        tar = FileEntry(path.name, length, sha256)
        entry = FileEntry(side.name, len(data), sha256_hex(data))
        found.append((ShardEntry(tar, entry, len(sidecar.rows)), sidecar))
    return found


def _check_adopted(
    fingerprint: Fingerprint, name: str, row: SidecarRow, facts: bytes, tensors: bytes
) -> None:
    """No manifest vouches for the sidecar: each of its facts must follow from the record itself."""
    check_record(row, facts, tensors, fingerprint, None, f"{name}, sample {row.sample_id}")


# ---- the other files -----------------------------------------------------------------------------


def write_unconditional(
    folder: Path, prompt_embeds: torch.Tensor, prompt_mask: torch.Tensor
) -> FileEntry:
    """Publish the embedding of the empty prompt: [T, D] bfloat16 and [T] bool."""
    from safetensors.torch import save

    data = save(
        {"prompt_embeds.0": prompt_embeds.contiguous(), "prompt_mask.0": prompt_mask.contiguous()}
    )
    return write_listed(folder, "unconditional", data, ".safetensors")


def write_previews(folder: Path, prompts: Sequence[PreviewPrompt]) -> FileEntry:
    """Publish preview prompts with their embeddings, at least one."""
    return write_listed(folder, "previews", encode_previews(prompts), ".safetensors")


def write_rgb(folder: Path, rgb: RgbMap) -> FileEntry:
    """Publish the linear map from latents to RGB."""
    return write_listed(folder, "rgb", encode_rgb(rgb), ".json")


def write_retired(folder: Path, sample_ids: Iterable[str]) -> FileEntry | None:
    """Publish the list of retired samples; None when it is empty."""
    names = sorted(set(sample_ids))
    return write_listed(folder, "retired", canonical_json(names), ".json") if names else None


def write_listed(folder: Path, kind: str, data: bytes, suffix: str) -> FileEntry:
    """Publish a small file under its content name."""
    sha256 = sha256_hex(data)
    entry = FileEntry(content_name(kind, sha256, suffix), len(data), sha256)
    write_atomic(folder / entry.name, data, _local(folder))
    return entry


def publish_manifest(folder: Path, manifest: Manifest) -> str:
    """Publish a generation and point `manifest.json` at it; returns the generation's name."""
    data = encode_manifest(manifest)
    decode_manifest(data, "new manifest")
    entry = write_listed(folder, "manifest", data, ".json")
    write_atomic(folder / MANIFEST, data, _local(folder))
    return entry.name


def build_manifest(
    folder: Path,
    *,
    shards: Sequence[ShardEntry],
    fingerprint: Fingerprint,
    latent_channels: int,
    latent_scale: int,
    text_width: int,
    posterior: str,
    model: dict[str, Any],
    recipe: dict[str, Any],
    unconditional: FileEntry,
    retired: FileEntry | None = None,
    previous: str | None = None,
    previews: FileEntry | None = None,
    rgb: FileEntry | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> Manifest:
    """A manifest over published shards, in name order, with counts and histograms from sidecars."""
    ordered = tuple(sorted(shards, key=lambda entry: entry.tar.name))
    draft = Manifest(
        fingerprint=fingerprint,
        latent_channels=latent_channels,
        latent_scale=latent_scale,
        text_width=text_width,
        posterior=posterior,
        model=model,
        recipe=recipe,
        shards=ordered,
        unconditional=unconditional,
        counts={},
        histograms={},
        retired=retired,
        previous=previous,
        previews=previews,
        rgb=rgb,
    )

    def sidecars() -> Iterable[tuple[ShardEntry, Sidecar]]:
        for entry in ordered:
            yield entry, read_sidecar(folder, entry)
            on_shard()

    counts, histograms = summarize_rows(sidecars(), read_retired(folder, draft))
    return replace(draft, counts=counts, histograms=histograms)


def _local(folder: Path) -> Path:
    local = folder / LOCAL
    local.mkdir(parents=True, exist_ok=True)
    return local
