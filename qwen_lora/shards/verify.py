"""`qwen-lora shards verify`: every byte of a set against the chain of hashes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qwen_lora.errors import QwenLoraError, ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.progress import Progress
from qwen_lora.shards.format import Geometry, Manifest, RecordMeta, ShardEntry, latent_id, text_id
from qwen_lora.shards.manifest import (
    load_manifest,
    read_listed,
    read_retired,
    read_sidecar,
    summarize_rows,
)
from qwen_lora.shards.record import (
    LATENT_NAMES,
    RecordShape,
    check_tensors,
    check_values,
    decode_meta,
)
from qwen_lora.shards.sidecar import (
    BLOCK,
    MEMBERS,
    TAR_RECORD,
    MemberEntry,
    Sidecar,
    SidecarRow,
    canonical_header,
    padded,
)


@dataclass
class VerifyReport:
    """What was checked, what is wrong (`problems`), and what is merely worth knowing (`notes`)."""

    path: str
    generation: str = ""
    deep: bool = False
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path, deep: bool = False) -> VerifyReport:
    """Check a shard set; `deep` decodes every record too (shapes, finite values).

    All problems are collected. Raises InputError only when there is no shard set at `path` or this
    version cannot read its format.
    """
    folder = Path(path)
    report = VerifyReport(str(path), deep=deep)
    try:
        manifest, report.generation = load_manifest(folder)
    except ShardError as error:
        report.problems.append(str(error))
        return report
    with Progress("verifying", len(manifest.shards), "shards") as progress:
        sidecars = []
        for entry in manifest.shards:
            sidecar = _verify_shard(folder, manifest, entry, report, deep)
            if sidecar is not None:
                sidecars.append((entry, sidecar))
            progress.update()
    _verify_rest(folder, manifest, sidecars, report)
    listed = {file.name for entry in manifest.shards for file in (entry.tar, entry.sidecar)}
    for other in sorted(folder.glob("shard-*")):
        if other.name not in listed:
            report.notes.append(f"{other.name} is in no shard of this generation")
    return report


def _verify_shard(
    folder: Path, manifest: Manifest, entry: ShardEntry, report: VerifyReport, deep: bool
) -> Sidecar | None:
    try:
        sidecar = read_sidecar(folder, entry)
        if sidecar.fingerprint.hash != manifest.fingerprint.hash:
            raise ShardError(f"{entry.sidecar.name}: another fingerprint than the manifest's")
        data = read_listed(folder, entry.tar)
    except (ShardError, OSError) as error:
        report.problems.append(str(error))
        return None
    report.shards += 1
    report.bytes += len(data)
    try:
        _check_layout(data, sidecar, entry.tar.name)
    except ShardError as error:
        report.problems.append(str(error))
    for row in sidecar.rows:
        report.samples += 1
        try:
            _check_row(data, row, manifest, entry.tar.name, deep)
        except ShardError as error:
            report.problems.append(str(error))
    return sidecar


def _check_layout(data: bytes, sidecar: Sidecar, name: str) -> None:
    """The tar is exactly what the writer makes: canonical headers, zero padding, one end."""
    position = 0
    for row in sidecar.rows:
        for member in MEMBERS:
            entry: MemberEntry = getattr(row, member)
            header = canonical_header(f"{row.sample_id}.{member}", entry.bytes)
            if data[position : position + BLOCK] != header:
                raise ShardError(f"{name}: the tar header at byte {position} is not canonical")
            end = entry.offset + entry.bytes
            position = entry.offset + padded(entry.bytes)
            if data[end:position].strip(b"\0"):
                raise ShardError(f"{name}: bytes behind the member that ends at {end}")
    total = -(-(position + 2 * BLOCK) // TAR_RECORD) * TAR_RECORD
    if len(data) != total or data[position:].strip(b"\0"):
        raise ShardError(f"{name}: the tar does not end after its last member")


def _check_row(data: bytes, row: SidecarRow, manifest: Manifest, name: str, deep: bool) -> None:
    what = f"{name}, sample {row.sample_id}"
    view = memoryview(data)
    members = {}
    for member in MEMBERS:
        entry: MemberEntry = getattr(row, member)
        members[member] = view[entry.offset : entry.offset + entry.bytes]
        if sha256_hex(members[member]) != entry.sha256:
            raise ShardError(f"{what}: the {member} member is damaged")
    meta = decode_meta(members["json"], what)
    _check_meta(meta, row, manifest, what)
    scale = manifest.latent_scale
    latent_shape = (manifest.latent_channels, row.bucket[0] // scale, row.bucket[1] // scale)
    expected = RecordShape(
        LATENT_NAMES[manifest.posterior], latent_shape, row.token_counts, manifest.text_width
    )
    entries = check_tensors(members["safetensors"], expected, what)
    if deep:
        check_values(members["safetensors"], entries, what)


def _check_meta(meta: RecordMeta, row: SidecarRow, manifest: Manifest, what: str) -> None:
    """Sidecar and JSON member tell the same, and the ids follow from it."""
    if (meta.bucket, meta.source_sha256, meta.group) != (row.bucket, row.source_sha256, row.group):
        raise ShardError(f"{what}: the JSON member and the sidecar differ")
    geometry = Geometry(meta.crop_box, meta.bucket, meta.flipped)
    if row.latent_id != latent_id(meta.source_sha256, geometry, manifest.fingerprint.vae_hash):
        raise ShardError(f"{what}: the latent id is not that of its source, crop and encoder")
    if meta.captions is not None:
        texts = [text_id(text, manifest.fingerprint.text_hash) for text in meta.captions]
        if list(row.text_ids) != texts:
            raise ShardError(f"{what}: the text ids are not those of its captions")
    if len(meta.truncated_tokens) != len(row.token_counts):
        raise ShardError(f"{what}: truncated_tokens has another length than the captions")


def _verify_rest(
    folder: Path,
    manifest: Manifest,
    sidecars: list[tuple[ShardEntry, Sidecar]],
    report: VerifyReport,
) -> None:
    for entry in (manifest.unconditional, manifest.previews, manifest.rgb, manifest.retired):
        if entry is not None:
            try:
                report.bytes += len(read_listed(folder, entry))
            except ShardError as error:
                report.problems.append(str(error))
    seen: dict[str, str] = {}
    for shard, sidecar in sidecars:
        for row in sidecar.rows:
            other = seen.setdefault(row.sample_id, shard.tar.name)
            if other != shard.tar.name:
                report.problems.append(
                    f"sample {row.sample_id} stands in {other} and in {shard.tar.name}"
                )
    if len(sidecars) == len(manifest.shards):
        try:
            counts, histograms = summarize_rows(sidecars, read_retired(folder, manifest))
        except QwenLoraError:
            return  # the retired list is broken, which was reported above
        if (counts, histograms) != (manifest.counts, manifest.histograms):
            report.problems.append(
                "the manifest's counts or histograms are not those of its shards"
            )
