"""`qwen-lora shards verify`: every byte of a set against the chain of hashes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_lora.errors import ShardError
from qwen_lora.progress import Progress
from qwen_lora.shards.check import check_record, expected_shape, scan_tar
from qwen_lora.shards.format import NAME_HEX, Manifest, ShardEntry
from qwen_lora.shards.generations import listed_files, walk_generations
from qwen_lora.shards.manifest import (
    MANIFEST,
    damaged_generations,
    is_name_of_format,
    load_manifest,
    read_listed,
    read_retired,
    read_sidecar,
    summarize_rows,
)
from qwen_lora.shards.previews import read_prompts, read_rgb
from qwen_lora.shards.record import (
    check_tensors,
    check_values,
    unconditional_shape,
)
from qwen_lora.shards.sidecar import Sidecar, SidecarRow
from qwen_lora.shards.store import Place, Store, opened_store


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


def verify(path: Place, deep: bool = False) -> VerifyReport:
    """Check a shard set; `deep` decodes every record too (shapes, finite values).

    All problems are collected. Raises InputError only when there is no shard set at `path` or this
    version cannot read its format.
    """
    with opened_store(path) as opened:
        store = opened.fresh()
        report = VerifyReport(store.label, deep=deep)
        try:
            manifest, report.generation = load_manifest(store)
        except ShardError as error:
            report.problems.append(str(error))
            return report
        with Progress("verifying", len(manifest.shards), "shards") as progress:
            sidecars = []
            for entry in manifest.shards:
                sidecar = _verify_shard(store, manifest, entry, report, deep)
                if sidecar is not None:
                    sidecars.append((entry, sidecar))
                progress.update()
        _verify_rest(store, manifest, sidecars, report)
        report.notes += _tell_others(store)
    return report


def _tell_others(store: Store) -> list[str]:
    """Of files named as this format's, those that the newest generation does not need."""
    newest, *older = walk_generations(store)
    known = {MANIFEST, newest.name, *listed_files(newest.manifest), *(each.name for each in older)}
    held = {name for each in older for name in listed_files(each.manifest)} - known
    there = [name for name in store.names() or () if is_name_of_format(name) and name not in known]
    strays = [name for name in there if name not in held]
    notes = []
    if len(there) > len(strays):
        notes.append(
            f"{len(there) - len(strays)} files belong to older generations alone and were not "
            "checked; `qwen-lora shards prune --all` removes them"
        )
    if strays:
        shown = ", ".join(strays[:3]) + (", ..." if len(strays) > 3 else "")
        notes.append(
            f"{len(strays)} files belong to no generation ({shown}), such as finished shards of a "
            "stopped precompute; `qwen-lora shards prune --unlisted` removes them"
        )
    return notes


def _verify_shard(
    store: Store, manifest: Manifest, entry: ShardEntry, report: VerifyReport, deep: bool
) -> Sidecar | None:
    try:
        sidecar = read_sidecar(store, entry)
        if sidecar.fingerprint.hash != manifest.fingerprint.hash:
            raise ShardError(f"{entry.sidecar.name}: another fingerprint than the manifest's")
    except (ShardError, OSError) as error:
        report.problems.append(str(error))
        sidecar = None
    scale = manifest.latent_scale

    def on_record(row: SidecarRow, facts: bytes, tensors: bytes) -> None:
        expected = expected_shape(manifest, row)
        what = f"{entry.tar.name}, sample {row.sample_id}"
        check_record(row, facts, tensors, manifest.fingerprint, expected, what, deep)
        if row.bucket[0] % scale or row.bucket[1] % scale:
            raise ShardError(f"{what}: its bucket is not a multiple of {scale} pixels")

    try:
        rows = sidecar.rows if sidecar is not None else ()
        with store.open(entry.tar) as file:
            sha256, length, problems = scan_tar(file, entry.tar.name, rows, on_record)
    except ShardError as error:
        report.problems.append(str(error))
        return sidecar
    except OSError as error:  # in the middle of a read
        report.problems.append(f"{store.where(entry.tar.name)} cannot be read: {error.strerror}")
        return sidecar
    report.shards += 1
    report.bytes += length + entry.sidecar.bytes
    report.samples += len(rows)
    if sidecar is not None:  # without one, nothing is known about what the tar should hold
        report.problems += problems
    if sha256 != entry.tar.sha256:
        report.problems.append(
            f"{store.where(entry.tar.name)} is damaged: sha256 {sha256[:NAME_HEX]}, the manifest "
            f"says {entry.tar.sha256[:NAME_HEX]}; copy it again from its source"
        )
    return sidecar


def check_listed(store: Store, manifest: Manifest) -> None:
    """Raises ShardError unless the small files that go with the shards are what they should be."""
    _check_unconditional(store, manifest)
    read_prompts(store, manifest)
    read_rgb(store, manifest)


def _check_unconditional(store: Store, manifest: Manifest) -> None:
    entry = manifest.unconditional
    data = read_listed(store, entry)
    shape = unconditional_shape(data, manifest.text_width, entry.name)
    check_values(data, check_tensors(data, shape, entry.name), entry.name)


def _verify_rest(
    store: Store,
    manifest: Manifest,
    sidecars: list[tuple[ShardEntry, Sidecar]],
    report: VerifyReport,
) -> None:
    for name in damaged_generations(store):
        advice = "copy it again from its source; `qwen-lora shards prune --unlisted` removes it"
        if name == report.generation:
            advice = f"copy {MANIFEST} over it"
        report.problems.append(
            f"{store.where(name)} is damaged: its content belongs to another name; {advice}"
        )
    for entry, check in (
        (manifest.unconditional, _check_unconditional),
        (manifest.previews, read_prompts),
        (manifest.rgb, read_rgb),
        (manifest.retired, read_retired),
    ):
        if entry is not None:
            try:
                check(store, manifest)
                report.bytes += entry.bytes
            except (ShardError, OSError) as error:
                report.problems.append(str(error))
    seen: dict[str, str] = {}
    for shard, sidecar in sidecars:
        for row in sidecar.rows:
            other = seen.setdefault(row.sample_id, shard.tar.name)
            if other != shard.tar.name:
                report.problems.append(
                    f"sample {row.sample_id} stands in {other} and in {shard.tar.name}"
                )
    try:
        retired = read_retired(store, manifest)
    except (ShardError, OSError) as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))
        return
    if len(sidecars) == len(manifest.shards):
        counts, histograms = summarize_rows(sidecars, retired)
        if (counts, histograms) != (manifest.counts, manifest.histograms):
            report.problems.append(
                "the manifest's counts or histograms are not those of its shards"
            )
