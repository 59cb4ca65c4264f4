"""`--sync`: which stored samples have lost their image, and when that looks like a mistake."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.hashing import sha256_hex
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.precompute.inspect import read_source
from qwen_lora.precompute.plan import dataset_folder
from qwen_lora.precompute.remembered import RememberedSources
from qwen_lora.precompute.types import ImageSource, Skip
from qwen_lora.precompute.worklist import Wanted
from qwen_lora.shards.reader import ShardSet

ASKED_ABOVE = 0.1  # of the live samples


@dataclass(frozen=True)
class Sync:
    """What the user asked for."""

    wanted: bool = False
    confirmed: bool = False

    def __post_init__(self) -> None:
        if self.confirmed and not self.wanted:
            raise InputError("--yes has no effect without --sync; leave it out or add --sync")


@dataclass(frozen=True)
class Removal:
    """Live samples whose image is gone from the dataset."""

    sample_ids: frozenset[str] = frozenset()
    live: int = 0  # samples in the set before
    held_back: str = ""  # why nothing is retired although images are gone

    @property
    def large(self) -> bool:
        return len(self.sample_ids) > ASKED_ABOVE * self.live

    def line(self) -> str:
        """For a person; empty when nothing is gone."""
        if self.held_back:
            return f"sync: nothing is retired: {self.held_back}"
        if not self.sample_ids:
            return ""
        count = len(self.sample_ids)
        return f"sync: {count} of {self.live} samples have lost their image and are retired"

    def check(self, sync: Sync, dataset: Path) -> None:
        """Raises InputError for a removal above 10 % that was not confirmed."""
        if self.large and not sync.confirmed:
            count = len(self.sample_ids)
            raise InputError(
                f"--sync would retire {count} of {self.live} samples "
                f"({100 * count / self.live:.0f} %), whose images are not in {dataset}; "
                "add --yes if they are to go, or name the right dataset"
            )


def find_removed(
    existing: ExistingSet,
    wanted: Wanted,
    skips: Iterable[Skip],
    sources: RememberedSources,
    settings: Settings,
) -> Removal:
    """The samples that `--sync` retires: live, and no file of the scan has their bytes.

    A file that was skipped keeps what the set has of it: more skips, fewer samples. It is
    recognised by its bytes, by those that its path had before, and by its name, or its folder's or
    tar's, in the records.
    Raises ShardError for a damaged record.
    """
    seen = {sample.inspection.source_sha256 for sample in wanted.samples.values()}
    live = existing.sources.keys() - existing.retired
    gone = {each: existing.sources[each] for each in live if existing.sources[each] not in seen}
    skips = [skip for skip in skips if skip.reason != "image_missing"]
    if not gone or not skips:
        return Removal(frozenset(gone), len(live))
    dataset = dataset_folder(settings)
    root = dataset if dataset.is_dir() else dataset.parent
    kept, untold = _kept_sources(skips, root, sources, set(existing.sources.values()))
    names = _names(existing, {each for each, source in gone.items() if source not in kept})
    if untold and not all(names.values()):
        return Removal(
            frozenset(),
            len(live),
            f"{untold[0].name} ({untold[0].reason}; {len(untold)} such files) may belong to the "
            "samples whose images are gone, and the set holds no file names; put them right or "
            "take them away",
        )
    skipped = {skip.name for skip in skips}
    return Removal(
        frozenset(each for each, name in names.items() if not _below(name, skipped)), len(live)
    )


def _kept_sources(
    skips: Iterable[Skip], root: Path, sources: RememberedSources, stored: Collection[str]
) -> tuple[set[str], list[Skip]]:
    """Hashes of skipped files, now and before, and the skips of which neither tells what they were.

    Bytes that decode to no image are not those that were encoded from that file, if any were.
    """
    kept: set[str] = set()
    untold = []
    for skip in skips:
        image = ImageSource(skip.name, root / skip.name)
        before = sources.known_at(image)
        now = None if skip.reason.startswith("tar_") else _hash(image)
        kept |= {each for each in (before, now) if each is not None}
        if before not in stored and (now is None or skip.reason == "undecodable"):
            untold.append(skip)
    return kept, untold


def _hash(image: ImageSource) -> str | None:
    try:
        return sha256_hex(read_source(image))
    except (OSError, ValueError):
        return None


def _names(existing: ExistingSet, sample_ids: Collection[str]) -> Mapping[str, str | None]:
    """The source names of stored samples; None where the set keeps none."""
    if not sample_ids or existing.manifest_name is None:
        return {}
    shards = ShardSet.open(existing.store, existing.manifest_name)
    try:
        return {
            sample_id: shards.read_meta(row).source
            for row, sample_id in enumerate(shards.table.sample_id)
            if sample_id in sample_ids
        }
    finally:
        shards.close_files()


def _below(name: str | None, skipped: Collection[str]) -> bool:
    """Whether a name is that of a skipped file, or lies in a skipped folder or tar."""
    parts = (name or "").split("/")
    return any("/".join(parts[:end]) in skipped for end in range(1, len(parts) + 1))
