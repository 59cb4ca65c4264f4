"""`qwen-lora shards prune`: retired samples and old generations leave the disk. No torch.

New shards, then the manifest, then removal: whenever it is stopped, every generation that is kept
has all its files, and the same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from qwen_lora.errors import InputError
from qwen_lora.progress import Progress
from qwen_lora.shards.copy import changing
from qwen_lora.shards.cut import shard_samples_limit
from qwen_lora.shards.format import ShardEntry
from qwen_lora.shards.generations import Generation, listed_files, walk_generations
from qwen_lora.shards.manifest import MANIFEST, is_name_of_format, load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.rewrite import Part, rewrite, shard_rows
from qwen_lora.shards.store import Place, Store, opened_store
from qwen_lora.shards.writer import build_manifest, publish_manifest

KEPT_GENERATIONS = 2  # a run that is pinned to the last but one can go on


@dataclass
class PruneReport:
    """What was done, or would be with `dry_run`."""

    path: str
    dry_run: bool
    generation: str = ""  # the newest
    retired: int = 0  # samples that are in no shard of the newest generation any more
    shards_rewritten: int = 0
    bytes_written: int = 0  # of records
    kept_generations: list[str] = field(default_factory=list)
    removed_generations: list[str] = field(default_factory=list)
    removed_files: list[str] = field(default_factory=list)  # manifests among them
    bytes_freed: int = 0
    held_files: int = 0  # that only the older of the kept generations needs
    held_bytes: int = 0
    held_retired: int = 0
    unlisted: int = 0  # files of no generation that were left

    def lines(self) -> list[str]:
        would = "would be " if self.dry_run else ""
        lines = []
        if self.retired:
            lines.append(
                f"{self.retired} retired samples {would}left out of {self.shards_rewritten} "
                f"shards, {_mib(self.bytes_written)} of records {would}written anew"
            )
        lines.append(
            f"{len(self.removed_files)} files {would}removed, {_mib(self.bytes_freed)} "
            f"{would}freed; kept: {', '.join(self.kept_generations)}"
        )
        if self.held_files:
            lines.append(
                f"note: {self.kept_generations[-1]} is kept for runs that started with it, and "
                f"with it {self.held_files} files, {_mib(self.held_bytes)}, "
                f"{self.held_retired} retired samples in them; --all removes it"
            )
        if self.unlisted:
            lines.append(
                f"note: {self.unlisted} files belong to no kept generation, such as finished "
                "shards of a stopped precompute; --unlisted removes them"
            )
        return lines


def prune(
    place: Place, *, everything: bool = False, unlisted: bool = False, dry_run: bool = False
) -> PruneReport:
    """Write shards with retired samples anew without them, and remove what only old generations
    need: older than the last two, or with `everything` than the newest.

    `unlisted` also removes files named as this format's that no kept generation lists. `dry_run`
    changes nothing. Raises InputError where there is no set or it can only be read, ShardError when
    a record that is to be kept is damaged; then nothing was removed.
    """
    with opened_store(place) as store:
        store.check_writable()
        load_manifest(store)  # before a lock is laid into a folder that is no set
        if unlisted and store.names() is None:
            raise InputError(f"{store.label} cannot be listed, so nobody can tell what is unlisted")
        with ExitStack() as stack:
            if not dry_run:
                stack.enter_context(changing(store))
            report = PruneReport(store.label, dry_run)
            older = walk_generations(store)
            generations = chain(_compact(store, next(older), report), older)
            _remove(store, generations, 1 if everything else KEPT_GENERATIONS, unlisted, report)
            return report


def _compact(store: Store, newest: Generation, report: PruneReport) -> list[Generation]:
    """The newest generation, and before it a new one when a shard holds retired samples."""
    shards = ShardSet.of_manifest(store, newest.manifest, newest.name)
    try:
        whole: list[ShardEntry] = []
        parts: list[Part] = []
        touched = 0
        for index, live in shard_rows(shards):
            entry = newest.manifest.shards[index]
            if len(live) == entry.samples:
                whole.append(entry)
                continue
            touched += 1
            report.retired += entry.samples - len(live)
            if live:
                parts.append(Part(shards, index, np.array(live, np.int64)))
        report.generation = newest.name
        if not touched:
            return [newest]
        report.shards_rewritten = touched
        report.bytes_written = sum(sum(part.sizes()) for part in parts)
        if report.dry_run:
            coming = replace(newest.manifest, shards=tuple(whole), retired=None)
            return [Generation("a new generation", coming), newest]
        limit = shard_samples_limit(len(shards))
        with Progress("compacting", sum(len(part.rows) for part in parts), "samples") as progress:
            for entry in rewrite(store, parts, limit):
                whole.append(entry)
                progress.update(entry.samples)
    finally:
        shards.close_files()
    new = _publish(store, newest, whole)
    report.generation = new.name
    return [new, newest]


def _publish(store: Store, old: Generation, shards: Sequence[ShardEntry]) -> Generation:
    """`old` with other shards and nothing retired, as the newest generation."""
    manifest = build_manifest(
        store,
        shards=shards,
        fingerprint=old.manifest.fingerprint,
        latent_channels=old.manifest.latent_channels,
        latent_scale=old.manifest.latent_scale,
        text_width=old.manifest.text_width,
        posterior=old.manifest.posterior,
        model=old.manifest.model,
        recipe=old.manifest.recipe,
        unconditional=old.manifest.unconditional,
        previous=old.name,
        previews=old.manifest.previews,
        rgb=old.manifest.rgb,
    )
    return Generation(publish_manifest(store, manifest), manifest)


def _remove(
    store: Store,
    generations: Iterator[Generation],
    keep: int,
    unlisted: bool,
    report: PruneReport,
) -> None:
    """Delete what only dropped generations need, then their manifests, the oldest first: while a
    manifest is there, a later run can tell what was to go with it."""
    kept = list(islice(generations, keep))
    needed = {name for each in kept for name in listed_files(each.manifest)}
    listing = store.names()
    there = None if listing is None else set(listing)
    files: dict[str, int] = {}
    manifests: list[str] = []
    for each in generations:
        manifests.insert(0, each.name)
        for name, entry in listed_files(each.manifest).items():
            if name not in needed and (there is None or name in there):
                files[name] = entry.bytes
    known = {MANIFEST, *needed, *files, *manifests, *(each.name for each in kept)}
    odd = [name for name in listing or () if name not in known and is_name_of_format(name)]
    if unlisted:
        files |= {name: store.size(name) or 0 for name in odd}
    report.unlisted = 0 if unlisted else len(odd)
    report.kept_generations = [each.name for each in kept]
    report.removed_generations = manifests
    report.removed_files = [*sorted(files), *manifests]
    report.bytes_freed = sum(files.values()) + sum(store.size(name) or 0 for name in manifests)
    _tell_held(kept, report)
    if not report.dry_run:
        _delete(store, report.removed_files)


def _delete(store: Store, names: Iterable[str]) -> None:
    for name in names:
        store.delete(name)


def _tell_held(kept: Sequence[Generation], report: PruneReport) -> None:
    newest = listed_files(kept[0].manifest)
    for older in kept[1:]:
        held = [entry for name, entry in listed_files(older.manifest).items() if name not in newest]
        report.held_files = len(held)
        report.held_bytes = sum(entry.bytes for entry in held)
        report.held_retired = older.manifest.counts.get("retired", 0) if held else 0


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
