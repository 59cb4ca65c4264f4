"""`qwen-lora shards merge`: several sets with one fingerprint become one. No torch, no decoding.

A shard of which every sample is wanted is copied whole, so it keeps its name and whoever has it
cached need not fetch it again; what is left over is written anew, in the order of the sets and of
their shards, cut as precompute cuts. Into a set that exists, samples are appended as a generation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qwen_lora.errors import InputError
from qwen_lora.progress import Progress
from qwen_lora.shards.alike import PRIVACY, check_alike, join_recipes
from qwen_lora.shards.copy import changing, copy_shard
from qwen_lora.shards.cut import MAX_SHARD_BYTES, shard_samples_limit
from qwen_lora.shards.format import FileEntry, Manifest, RecordMeta, ShardEntry
from qwen_lora.shards.manifest import (
    MANIFEST,
    MANIFEST_MAX_BYTES,
    load_manifest,
    read_listed,
    read_retired,
    read_sidecar,
)
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.rewrite import Part, rewrite, shard_rows
from qwen_lora.shards.store import FolderStore, Place, Store, open_store, opened_store
from qwen_lora.shards.verify import check_listed
from qwen_lora.shards.writer import build_manifest, publish_manifest, write_retired


@dataclass
class MergeReport:
    """What a merge did."""

    output: str
    generation: str = ""
    sets: int = 0
    samples: int = 0  # live samples of the output now
    added: int = 0
    duplicates: int = 0  # left out: an earlier set has them
    retired: int = 0  # left out: their set has retired them
    restored: int = 0  # retired in the output, live in a set that was merged: live again
    shards_copied: int = 0  # whole
    shards_written: int = 0
    stripped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        left = f"{self.duplicates} duplicates and {self.retired} retired samples left out"
        back = f", {self.restored} retired ones live again" if self.restored else ""
        return (
            f"{self.output}: {self.samples} samples, {self.added} of them new from {self.sets} "
            f"sets ({self.shards_copied} shards copied, {self.shards_written} written); {left}"
            f"{back}; {self.generation}"
        )


def merge(places: Sequence[Place], output: Place, strip: Collection[str] = ()) -> MergeReport:
    """Bring the live samples of sets into `output`, each sample id once: the first set wins.

    An `output` that is a set already comes first of all and gets a new generation. `strip` takes
    "captions" or "source" (names) out of the JSON members of what is added. The manifest comes
    last: what an interrupted merge leaves is no set, and the same call ends with the same bytes.
    Raises InputError, before anything is written, for sets of other encoders or rules and for an
    output that can only be read; ShardError for a damaged set.
    """
    unknown = sorted(set(strip) - set(PRIVACY))
    if unknown:
        raise InputError(f"cannot strip {', '.join(unknown)}; what can be is {', '.join(PRIVACY)}")
    with opened_store(output) as store, ExitStack() as stack:
        store.check_writable()
        sets = []
        for place in places:
            source = open_store(place)
            if not _same(source, store):
                sets.append(stack.enter_context(ShardSet.open(source)))
            elif source is not store:
                source.close()
        if not sets:
            raise InputError("nothing to merge: name at least one other set than the output")
        _check(store, sets, _present(store), strip)
        for shards in sets:
            check_listed(shards.store, shards.manifest)
        with changing(store):
            return _Merge(store, sets, frozenset(strip)).run()


def _same(one: Store, other: Store) -> bool:
    if isinstance(one, FolderStore) and isinstance(other, FolderStore):
        return one.folder.resolve() == other.folder.resolve()
    return one.label == other.label


def _present(store: Store) -> tuple[Manifest, str] | None:
    """The output's manifest and generation, if it is a set."""
    if not store.exists():
        return None
    try:
        store.read(MANIFEST, MANIFEST_MAX_BYTES)
    except FileNotFoundError:
        return None
    return load_manifest(store)


def _check(
    store: Store,
    sets: Sequence[ShardSet],
    present: tuple[Manifest, str] | None,
    strip: Collection[str],
) -> dict[str, Any]:
    """The recipe of the whole. Raises InputError for what must not mix."""
    named = [(each.store.label, each.manifest) for each in sets]
    if present is not None:
        named.insert(0, (store.label, present[0]))
    check_alike(named)
    return join_recipes(named, strip, first_is_output=present is not None)


class _Merge:
    """One run, under the output's lock."""

    def __init__(self, store: Store, sets: Sequence[ShardSet], strip: frozenset[str]) -> None:
        self.store, self.sets, self.strip = store, sets, strip
        self.present = _present(store)
        self.recipe = _check(store, sets, self.present, strip)
        self.report = MergeReport(store.label, sets=len(sets), stripped=sorted(strip))
        self.old_shards: tuple[ShardEntry, ...] = ()
        self.retired: set[str] = set()

    def run(self) -> MergeReport:
        parts = self._plan()
        whole, rest = self._split(parts)
        new = []
        total = sum(len(part.rows) for part in parts)
        change = self._stripped if self.strip else None
        with Progress("merging", total, "samples") as progress:
            for part in whole:
                copied = copy_shard(part.shards.store, part.shards.manifest, part.entry, self.store)
                new.append(copied)
                progress.update(len(part.rows))
            for entry in rewrite(self.store, rest, shard_samples_limit(total), change):
                new.append(entry)
                progress.update(entry.samples)
        self.report.shards_copied, self.report.shards_written = len(whole), len(new) - len(whole)
        self.report.added = total
        self._publish(new)
        return self.report

    # ---- what is wanted --------------------------------------------------------------------------

    def _plan(self) -> list[Part]:
        """Shards with wanted samples, in order; counts what is left out."""
        seen, waiting = self._stored()
        parts = []
        for shards in self.sets:
            ids = list(shards.table.sample_id)
            for index, live in shard_rows(shards):
                rows = []
                self.report.retired += shards.manifest.shards[index].samples - len(live)
                for row in live:
                    if ids[row] in waiting:
                        waiting.remove(ids[row])
                        self.retired.remove(ids[row])
                        self.report.restored += 1
                    elif ids[row] in seen:
                        self.report.duplicates += 1
                    else:
                        rows.append(row)
                    seen.add(ids[row])
                if rows:
                    parts.append(Part(shards, index, np.array(rows, np.int64)))
        return parts

    def _stored(self) -> tuple[set[str], set[str]]:
        """Ids that the output has, and those of them that are retired."""
        if self.present is None:
            return set(), set()
        manifest, _ = self.present
        self.old_shards = manifest.shards
        self.retired = set(read_retired(self.store, manifest))
        stored = {
            row.sample_id
            for entry in manifest.shards
            for row in read_sidecar(self.store, entry).rows
        }
        return stored, stored & self.retired

    def _split(self, parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
        """Shards to copy whole, and those of which records are taken. A small one is not worth a
        file of its own: it must be half full, in samples or in bytes."""
        if self.strip:
            return [], list(parts)
        limit = shard_samples_limit(sum(len(part.rows) for part in parts))
        whole: list[Part] = []
        rest: list[Part] = []
        for part in parts:
            complete = len(part.rows) == part.entry.samples
            full = 2 * len(part.rows) >= limit or 2 * part.entry.tar.bytes >= MAX_SHARD_BYTES
            (whole if complete and full else rest).append(part)
        return whole, rest

    # ---- writing ---------------------------------------------------------------------------------

    def _stripped(self, meta: RecordMeta) -> RecordMeta:
        if "captions" in self.strip:
            meta = replace(meta, captions=None)
        if "source" in self.strip:
            meta = replace(meta, source=None)
        return meta

    def _publish(self, new: Sequence[ShardEntry]) -> None:
        old, generation = self.present or (None, None)
        previews, rgb = self._carried("previews"), self._carried("rgb")
        if "captions" in self.strip and previews is not None:
            self.report.notes.append("preview prompts stay in the set as texts")
        unchanged = old is not None and not new and not self.report.restored
        if old is not None and generation is not None and unchanged:
            if (old.recipe, old.previews, old.rgb) == (self.recipe, previews, rgb):
                self.report.generation, self.report.samples = generation, old.counts["samples"]
                return
        first = old or self.sets[0].manifest
        unconditional = self._carried("unconditional")
        assert unconditional is not None  # every manifest has one
        manifest = build_manifest(
            self.store,
            shards=[*self.old_shards, *new],
            fingerprint=first.fingerprint,
            latent_channels=first.latent_channels,
            latent_scale=first.latent_scale,
            text_width=first.text_width,
            posterior=first.posterior,
            model=first.model,
            recipe=self.recipe,
            unconditional=unconditional,
            retired=write_retired(self.store, self.retired),
            previous=generation,
            previews=previews,
            rgb=rgb,
        )
        self.report.generation = publish_manifest(self.store, manifest)
        self.report.samples = manifest.counts["samples"]

    def _carried(self, name: str) -> FileEntry | None:
        """The output's own file of this kind, else the first that a set has, copied."""
        if self.present is not None:
            own: FileEntry | None = getattr(self.present[0], name)
            if own is not None:
                return own
        for shards in self.sets:
            entry: FileEntry | None = getattr(shards.manifest, name)
            if entry is not None:
                self.store.write(entry.name, read_listed(shards.store, entry))
                return entry
        return None
