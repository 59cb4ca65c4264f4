"""The set that is there before a run: what it holds, what is superseded, what lies unlisted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass, field

from qwen_lora.errors import ShardError
from qwen_lora.precompute.stored import StoredParts, find_stored
from qwen_lora.precompute.types import WorkItem
from qwen_lora.precompute.worklist import Wanted
from qwen_lora.shards.format import Fingerprint, Manifest, ShardEntry
from qwen_lora.shards.manifest import (
    MANIFEST,
    MANIFEST_MAX_BYTES,
    load_manifest,
    read_retired,
    read_sidecar,
)
from qwen_lora.shards.previews import read_prompts
from qwen_lora.shards.store import Store
from qwen_lora.shards.writer import adoptable_shards


@dataclass
class ExistingSet:
    """`sources` has every stored sample, retired ones too: a retired one that is wanted again only
    has to be taken off the list."""

    store: Store
    manifest: Manifest | None = None
    manifest_name: str | None = None
    sources: dict[str, str] = field(default_factory=dict)  # sample id -> source sha256
    retired: frozenset[str] = frozenset()
    groups: dict[str, str] = field(default_factory=dict)  # sample id -> group

    @classmethod
    def load(cls, store: Store) -> ExistingSet:
        """An empty set when there is no manifest.

        Raises ShardError when it is damaged or a shard is missing or cut off: a new generation must
        not promise what is not there.
        """
        if not _has_manifest(store):
            return cls(store)
        manifest, name = load_manifest(store)
        _check_there(store, manifest.shards)
        store.prepare(entry.sidecar for entry in manifest.shards)
        sources, groups = {}, {}
        for entry in manifest.shards:
            for row in read_sidecar(store, entry).rows:
                sources[row.sample_id] = row.source_sha256
                groups[row.sample_id] = row.group
        return cls(store, manifest, name, sources, read_retired(store, manifest), groups)

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        return () if self.manifest is None else self.manifest.shards

    def preview_prompts(self) -> list[str]:
        """Raises ShardError when their file is damaged."""
        return [] if self.manifest is None else read_prompts(self.store, self.manifest)

    def unlisted(
        self, fingerprint: Fingerprint, wanted: Container[str]
    ) -> list[tuple[ShardEntry, list[str]]]:
        """Whole shards of wanted samples that a stopped run left, with their sample ids."""
        listed = frozenset(entry.tar.name for entry in self.shards)
        return [
            (entry, [row.sample_id for row in sidecar.rows])
            for entry, sidecar in adoptable_shards(self.store, fingerprint, listed, wanted)
        ]

    def find(self, items: Iterable[WorkItem]) -> StoredParts:
        """What of the records to be made is stored already. Raises ShardError."""
        if self.manifest_name is None:
            return StoredParts()
        return find_stored(self.store, self.shards, self.manifest_name, items)

    def moved(self, wanted: Wanted) -> Counter[tuple[str, str]]:
        """Stored samples whose image is now in another first folder, counted by (old, new).

        A record keeps the group that it was written with: a name is no part of its id.
        """
        return Counter(
            (self.groups[sample_id], sample.inspection.candidate.group)
            for sample_id, sample in wanted.samples.items()
            if self.groups.get(sample_id, sample.inspection.candidate.group)
            != sample.inspection.candidate.group
        )

    def retired_after(self, wanted: Wanted, failed: Collection[str]) -> frozenset[str]:
        """Retired ids of the next generation.

        For an image that the scan saw, the stored samples that it no longer asks for are retired
        and those it asks for are live. An image with a sample that failed in this run keeps what
        it has; images that the scan did not see stay as they are.
        """
        seen = {sample.inspection.source_sha256 for sample in wanted.samples.values()}
        seen -= {
            sample.inspection.source_sha256
            for sample_id, sample in wanted.samples.items()
            if sample_id in failed
        }
        superseded = {
            sample_id
            for sample_id, source in self.sources.items()
            if source in seen and sample_id not in wanted.samples
        }
        return frozenset((self.retired - wanted.samples.keys()) | superseded)


def _has_manifest(store: Store) -> bool:
    try:
        store.read(MANIFEST, MANIFEST_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_there(store: Store, shards: Iterable[ShardEntry]) -> None:
    """Raises ShardError for a missing or shortened shard; a remote one is looked up in a list."""
    names = store.names() if store.is_remote else None
    there = None if names is None else set(names)
    for entry in shards:
        store.check(entry.tar)
        if there is not None and entry.tar.name not in there:
            raise ShardError(
                f"{store.where(entry.tar.name)} is missing; copy it again from its source"
            )
