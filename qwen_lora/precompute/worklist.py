"""From accepted images to shards, before anything is encoded: ids, duplicates, cuts, adoption.

Pure functions: equal images, captions and settings give equal shards, whatever is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_lora.families.base import TokenCount
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, WorkItem
from qwen_lora.shards.cut import cut_by_size
from qwen_lora.shards.format import (
    UNCONDITIONAL_CAPTION,
    Fingerprint,
    Geometry,
    ShardEntry,
    latent_id,
    sample_id,
    text_id,
)

ShardPlan = tuple[WorkItem, ...]


@dataclass(frozen=True)
class WantedSample:
    """A record that the set should have; its token counts are not known yet."""

    sample_id: str
    latent_id: str
    text_ids: tuple[str, ...]
    inspection: Inspection
    geometry: Geometry

    @property
    def captions(self) -> tuple[str, ...]:
        return encoded_captions(self.inspection.candidate)


@dataclass
class Wanted:
    """All records that a scan asks for, by sample id, and which file asked."""

    samples: dict[str, WantedSample] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> sample ids
    twins: dict[str, str] = field(default_factory=dict)  # duplicate -> the file kept for it


def encoded_captions(candidate: Candidate) -> tuple[str, ...]:
    """An empty caption is encoded, named and stored as the pipeline's empty prompt."""
    return tuple(caption or UNCONDITIONAL_CAPTION for caption in candidate.captions)


def list_wanted(
    files: Iterable[tuple[Inspection, Sequence[Geometry]]], fingerprint: Fingerprint
) -> Wanted:
    """Name every record. Of files with the same bytes, captions and geometry the first is kept."""
    wanted = Wanted()
    owners: dict[str, str] = {}
    vae_hash, text_hash = fingerprint.vae_hash, fingerprint.text_hash
    for inspection, geometries in files:
        name = inspection.candidate.image.name
        texts = tuple(text_id(each, text_hash) for each in encoded_captions(inspection.candidate))
        new = []
        for geometry in dict.fromkeys(geometries):  # two resolutions may share a bucket
            latent = latent_id(inspection.source_sha256, geometry, vae_hash)
            sample = sample_id(latent, list(texts))
            if sample in owners:
                wanted.twins.setdefault(name, owners[sample])
                continue
            owners[sample] = name
            wanted.samples[sample] = WantedSample(sample, latent, texts, inspection, geometry)
            new.append(sample)
        if new:
            wanted.files[name] = tuple(new)
            wanted.twins.pop(name, None)
    return wanted


def make_work_items(
    samples: Iterable[WantedSample],
    counts: Mapping[str, TokenCount],
    predict_bytes: Callable[[WantedSample, Sequence[TokenCount]], int],
) -> list[WorkItem]:
    """The work list, in sample-id order. `counts` are by caption."""
    items = []
    for sample in sorted(samples, key=lambda each: each.sample_id):
        tokens = [counts[caption] for caption in sample.captions]
        items.append(
            WorkItem(
                sample_id=sample.sample_id,
                latent_id=sample.latent_id,
                text_ids=sample.text_ids,
                inspection=sample.inspection,
                geometry=sample.geometry,
                token_counts=tuple(each.tokens for each in tokens),
                truncated_tokens=tuple(each.truncated for each in tokens),
                predicted_bytes=predict_bytes(sample, tokens),
            )
        )
    return items


def cut_shards(
    items: Sequence[WorkItem], *, max_bytes: int, max_samples: int, frame_bytes: int
) -> list[ShardPlan]:
    """Cut a work list into shards of consecutive samples, by the rule of `cut_by_size`."""
    cuts = cut_by_size(
        [item.predicted_bytes for item in items],
        max_bytes=max_bytes,
        max_samples=max_samples,
        frame_bytes=frame_bytes,
    )
    return [tuple(items[cut.start : cut.stop]) for cut in cuts]


@dataclass
class Adoption:
    """What a stopped run left behind that this one can keep."""

    entries: list[ShardEntry] = field(default_factory=list)
    sample_ids: set[str] = field(default_factory=set)
    shards: list[ShardPlan] = field(default_factory=list)  # planned and untouched
    leftovers: list[WorkItem] = field(default_factory=list)  # of planned shards that were touched


def adopt(
    planned: Sequence[ShardPlan], found: Iterable[tuple[ShardEntry, Sequence[str]]]
) -> Adoption:
    """Keep unlisted shards: those equal to a planned one, then any whose samples are all wanted.

    The planned cuts stay as they are, so a broken run ends with an unbroken one's bytes. A shard
    without some samples that could not be decoded leaves those over; they are tried again last.
    """
    plan_of = {item.sample_id: index for index, shard in enumerate(planned) for item in shard}
    sizes = [len(shard) for shard in planned]

    def equals_planned(ids: Sequence[str]) -> bool:
        touched = {plan_of.get(each) for each in ids}
        return len(touched) == 1 and None not in touched and sizes[touched.pop() or 0] == len(ids)

    adoption = Adoption()
    ordered = sorted(
        found, key=lambda each: (not equals_planned(each[1]), -len(each[1]), each[0].tar.name)
    )
    touched: set[int] = set()
    for entry, ids in ordered:
        if not ids or any(each not in plan_of or each in adoption.sample_ids for each in ids):
            continue
        adoption.entries.append(entry)
        adoption.sample_ids.update(ids)
        touched.update(plan_of[each] for each in ids)
    adoption.shards = [shard for index, shard in enumerate(planned) if index not in touched]
    adoption.leftovers = sorted(
        (
            item
            for index in touched
            for item in planned[index]
            if item.sample_id not in adoption.sample_ids
        ),
        key=lambda item: item.sample_id,
    )
    return adoption


def item_to_json(item: WorkItem) -> dict[str, Any]:
    """A work item for another rank. Paths are this machine's; they never reach a shard."""
    facts = asdict(item)
    facts["inspection"]["candidate"]["image"]["path"] = str(
        item.inspection.candidate.image.path.absolute()
    )
    return facts


def item_from_json(facts: Mapping[str, Any]) -> WorkItem:
    inspection = facts["inspection"]
    candidate = inspection["candidate"]
    image = candidate["image"]
    top, left, bottom, right = facts["geometry"]["crop_box"]
    height, width = facts["geometry"]["bucket"]
    return WorkItem(
        sample_id=facts["sample_id"],
        latent_id=facts["latent_id"],
        text_ids=tuple(facts["text_ids"]),
        inspection=Inspection(
            candidate=Candidate(
                image=ImageSource(**{**image, "path": Path(image["path"])}),
                captions=tuple(candidate["captions"]),
                group=candidate["group"],
            ),
            source_sha256=inspection["source_sha256"],
            original_size=(inspection["original_size"][0], inspection["original_size"][1]),
        ),
        geometry=Geometry(
            (top, left, bottom, right), (height, width), facts["geometry"]["flipped"]
        ),
        token_counts=tuple(facts["token_counts"]),
        truncated_tokens=tuple(facts["truncated_tokens"]),
        predicted_bytes=facts["predicted_bytes"],
    )
