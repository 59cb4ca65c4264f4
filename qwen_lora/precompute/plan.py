"""Rank 0's part before anything is encoded: what is there, what is wanted, what is to be done."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.base import Family, TokenCount
from qwen_lora.models import ModelFolder
from qwen_lora.precompute.ahead import work_ahead
from qwen_lora.precompute.geometry import make_geometries
from qwen_lora.precompute.inspect import inspect_image
from qwen_lora.precompute.output import folder_option, local_folder
from qwen_lora.precompute.remembered import RememberedSources
from qwen_lora.precompute.scan import scan_dataset
from qwen_lora.precompute.types import Candidate, Inspection, Scan, Skip
from qwen_lora.precompute.worklist import (
    ShardPlan,
    Wanted,
    WantedSample,
    cut_shards,
    encoded_captions,
    list_wanted,
    make_work_items,
)
from qwen_lora.progress import Progress
from qwen_lora.shards.cut import TAR_END_BYTES, shard_samples_limit
from qwen_lora.shards.format import Fingerprint, Geometry, RecordMeta
from qwen_lora.shards.record import LATENT_NAMES, RecordShape
from qwen_lora.shards.writer import predicted_record_bytes

DEFAULT_MODEL = "Qwen/Qwen-Image"
ENCODER_PARTS = ("vae", "text_encoder", "tokenizer")
CAPTIONS_AT_ONCE = 1024  # given to the tokenizer in one call


@dataclass
class Images:
    """Accepted files with their geometries, in scan order, and what was not accepted."""

    files: list[tuple[Inspection, tuple[Geometry, ...]]] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    partial: list[Skip] = field(default_factory=list)  # too small for one of several resolutions


def dataset_folder(settings: Settings) -> Path:
    """Raises InputError when no dataset is named, or when it holds the output folder."""
    dataset = settings.data_config.img_dir
    if dataset is None:
        raise InputError("no dataset: name a folder of images, or set data_config.img_dir")
    if not dataset.exists():
        raise InputError(f"dataset {dataset} does not exist")
    output = local_folder(settings)
    if output.resolve().is_relative_to(dataset.resolve()):
        raise InputError(
            f"the output {output} lies inside the dataset {dataset}; name another "
            f"{folder_option(settings)}, or its shards would be read as input the next time"
        )
    return dataset


def scan(settings: Settings) -> Scan:
    """Names and captions; prints the scanner's hints."""
    found = scan_dataset(dataset_folder(settings), settings.data_config)
    for hint in found.hints:
        print(f"hint: {hint}", file=sys.stderr)
    if found.ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.ignored.items()))
        print(f"ignored: {kinds}", file=sys.stderr)
    return found


def accept_images(
    found: Scan, settings: Settings, image_multiple: int, remembered: RememberedSources
) -> Images:
    """Hash every image and read its header, unless remembered; then give it its geometries."""
    images = Images(skips=list(found.skips))
    data = settings.data_config

    def inspect(candidate: Candidate) -> Inspection | Skip:
        known = remembered.find(candidate)
        if known is not None:
            return known
        identity = remembered.identity(candidate.image)
        result = inspect_image(candidate, data)
        if isinstance(result, Inspection):
            remembered.remember(result, identity)
        return result

    workers = settings.decode_workers
    with Progress("reading images", len(found.candidates), "files") as progress:
        for _, result in work_ahead(found.candidates, inspect, workers=workers, ahead=4 * workers):
            progress.update()
            if isinstance(result, Skip):
                images.skips.append(result)
            else:
                _add_geometries(images, result, settings, image_multiple)
    return images


def _add_geometries(
    images: Images, inspection: Inspection, settings: Settings, image_multiple: int
) -> None:
    data = settings.data_config
    geometries: list[Geometry] = []
    refused: list[Skip] = []
    for img_size in sorted(set(data.img_size)):
        made = make_geometries(inspection, data, img_size, image_multiple, settings.seed)
        if isinstance(made, Skip):
            refused.append(made)
        else:
            geometries += made
    if geometries:
        images.files.append((inspection, tuple(geometries)))
        images.partial += refused[:1]
    else:
        images.skips += refused[:1]


def remembered_rules(settings: Settings) -> dict[str, Any]:
    """The settings on which it depends whether an image is accepted by its header."""
    data = settings.data_config
    return {"max_pixels": data.max_pixels, "animated": data.animated}


def name_samples(images: Images, fingerprint: Fingerprint) -> Wanted:
    return list_wanted(images.files, fingerprint)


def tell_moved(moved: Mapping[tuple[str, str], int]) -> None:
    """Say which images lie in another folder than the one that their records name."""
    if moved:
        (old, new), _ = max(moved.items(), key=lambda each: (each[1], each[0]))
        print(
            f"hint: {sum(moved.values())} samples lie in another folder now "
            f"({old or 'the top'} -> {new or 'the top'}); the set keeps their groups, so a weight "
            "in the new folder's name does not reach them: use data_config.group_weights for the "
            "old name, or another --output",
            file=sys.stderr,
        )


def plan_shards(
    samples: Sequence[WantedSample], model: ModelFolder, settings: Settings
) -> list[ShardPlan]:
    """The work list of samples that the set lacks, cut into shards. Loads only the tokenizer."""
    if not samples:
        return []
    counts = count_tokens((text for sample in samples for text in sample.captions), model)
    cut_off = [count.truncated for count in counts.values() if count.truncated]
    if cut_off:
        print(
            f"hint: {len(cut_off)} captions are longer than the model reads; their ends are cut "
            f"off, at most {max(cut_off)} tokens",
            file=sys.stderr,
        )
    text_width = model.family.text_width(model)

    def predict(sample: WantedSample, tokens: Sequence[TokenCount]) -> int:
        return predict_bytes(sample, tokens, model.family, text_width, settings)

    return cut(make_work_items(samples, counts, predict), settings)


def predict_bytes(
    sample: WantedSample,
    tokens: Sequence[TokenCount],
    family: Family,
    text_width: int,
    settings: Settings,
) -> int:
    """Exact bytes of a record in its shard."""
    height, width = sample.geometry.bucket
    scale = family.latent_scale
    shape = RecordShape(
        LATENT_NAMES[settings.vae_posterior],
        (family.latent_channels, height // scale, width // scale),
        tuple(each.tokens for each in tokens),
        text_width,
    )
    meta = record_meta(
        sample.inspection, sample.geometry, [each.truncated for each in tokens], settings
    )
    return predicted_record_bytes(meta, shape.tensors())


def record_meta(
    inspection: Inspection, geometry: Geometry, truncated: Sequence[int], settings: Settings
) -> RecordMeta:
    """The JSON member; names and captions only as the settings allow."""
    candidate = inspection.candidate
    return RecordMeta(
        captions=list(encoded_captions(candidate)) if settings.captions_in_shards else None,
        source=candidate.image.name if settings.source_names else None,
        source_sha256=inspection.source_sha256,
        original_size=inspection.original_size,
        crop_box=geometry.crop_box,
        flipped=geometry.flipped,
        bucket=geometry.bucket,
        truncated_tokens=list(truncated),
        group=candidate.group,
    )


def missing_samples(wanted: Wanted, stored: Container[str]) -> list[WantedSample]:
    return [sample for key, sample in wanted.samples.items() if key not in stored]


def cut(items: Sequence[Any], settings: Settings) -> list[ShardPlan]:
    return cut_shards(
        items,
        max_bytes=settings.shard_max_mib << 20,
        max_samples=settings.shard_max_samples or shard_samples_limit(len(items)),
        frame_bytes=TAR_END_BYTES,
    )


def count_tokens(captions: Iterable[str], model: ModelFolder) -> Mapping[str, TokenCount]:
    unique = list(dict.fromkeys(captions))
    tokenizer = model.family.load_tokenizer(model)
    counts: dict[str, TokenCount] = {}
    with Progress("counting tokens", len(unique), "captions") as progress:
        for start in range(0, len(unique), CAPTIONS_AT_ONCE):
            some = unique[start : start + CAPTIONS_AT_ONCE]
            counts.update(zip(some, tokenizer.count(some), strict=True))
            progress.update(len(some))
    return counts


def needed_bytes(shards: Sequence[ShardPlan], sequential: bool, passing: bool = False) -> int:
    """Disk space of planned shards and their sidecars, and of the embeddings that wait between the
    two encoders of a sequential run. `passing`: shards go on to a remote set, two at a time."""
    records = [sum(item.predicted_bytes for item in shard) for shard in shards]
    wholes = [
        TAR_END_BYTES + size + 2048 + 1024 * len(shard)
        for shard, size in zip(shards, records, strict=True)
    ]
    kept = sorted(wholes)[-2:] if passing else wholes
    return sum(kept) + (sum(records) if sequential else 0)


def bucket_lines(shards: Iterable[ShardPlan]) -> list[str]:
    """One line a bucket, largest first: size and number of samples."""
    counts: dict[tuple[int, int], int] = {}
    for shard in shards:
        for item in shard:
            counts[item.geometry.bucket] = counts.get(item.geometry.bucket, 0) + 1
    ordered = sorted(counts.items(), key=lambda each: (-each[0][0] * each[0][1], each[0]))
    return [f"  {height:5d} x {width:<5d} {count:8d}" for (height, width), count in ordered]
