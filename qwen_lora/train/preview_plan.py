# ruff: noqa: TID253
"""What a run's previews show, settled before any weight is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.base import Family
from qwen_lora.shards.previews import PreviewPrompt, RgbMap
from qwen_lora.train.draw import Condition, Drawing
from qwen_lora.train.sources import Sources
from qwen_lora.train.table import PlanTable

if TYPE_CHECKING:
    from qwen_lora.train.assemble import DataPlan
    from qwen_lora.train.ranks import Ranks

FROM_CAPTIONS = 4  # prompts where the shards hold none


@dataclass(frozen=True)
class PreviewPlan:
    """Which pictures are drawn, how, and at which steps."""

    prompts: tuple[PreviewPrompt, ...]
    unconditional: Condition
    drawing: Drawing
    every: int  # steps
    rgb: RgbMap | None  # None: the VAE decodes

    def due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last


def wants_vae(settings: Settings) -> bool:
    return settings.preview_vae and settings.preview_steps != 0


def settle_previews(
    ranks: Ranks, settings: Settings, sources: Sources, data: DataPlan, family: Family
) -> PreviewPlan | None:
    """`plan_previews` on every rank; rank 0 says what there is to say."""
    plan, line = ranks.everywhere(lambda: plan_previews(settings, sources, data, family))
    if line and ranks.is_main:
        print(f"note: {line}", file=sys.stderr)
    return plan


def plan_previews(
    settings: Settings, sources: Sources, data: DataPlan, family: Family
) -> tuple[PreviewPlan | None, str]:
    """The plan, or None, and a line to say about it ("" when there is nothing to say).

    Prompts are those of all shard sets; where they hold none and previews were asked for, captions
    of the first measured samples. Raises InputError for a preview_size that cannot be drawn.
    """
    if settings.preview_steps == 0:
        return None, ""
    prompts = stored_prompts(sources)
    asked = settings.preview_steps is not None or settings.preview_vae
    if not prompts and not asked:
        return None, ""
    rgb = None if settings.preview_vae else rgb_map(sources)
    if rgb is None and not settings.preview_vae:
        return None, (
            "no previews: the shards have no latent-to-RGB map; run precompute again, which adds "
            "one, or use --preview-vae"
        )
    line = ""
    if not prompts:
        prompts = caption_prompts(sources, data.measured)
        line = (
            f"the shards hold no preview prompts: previews show {len(prompts)} of their captions "
            "(preview_prompts of precompute)"
        )
    if not prompts:
        return None, "no previews: neither preview prompts nor captions are in the shards"
    drawing = Drawing(
        latent_size=_latent_size(settings, data.table, family),
        steps=settings.preview_inference_steps,
        guidance=settings.preview_guidance,
        seed=settings.preview_seed,
    )
    every = settings.preview_steps or settings.checkpointing_steps
    # The sets have one fingerprint, so the empty prompt's embedding is the same in each.
    unconditional = sources.sets[0].unconditional()
    return PreviewPlan(tuple(prompts), unconditional, drawing, every, rgb), line


def rgb_map(sources: Sources) -> RgbMap | None:
    """The first set's that has one: the sets' latents are of one kind."""
    maps = (shard_set.rgb_map() for shard_set in sources.sets)
    return next((found for found in maps if found is not None), None)


def stored_prompts(sources: Sources) -> list[PreviewPrompt]:
    """The preview prompts of all sets, each text once."""
    unique: dict[str, PreviewPrompt] = {}
    for shard_set in sources.sets:
        for prompt in shard_set.preview_prompts():
            unique.setdefault(prompt.prompt, prompt)
    return list(unique.values())


def caption_prompts(sources: Sources, table: PlanTable) -> list[PreviewPrompt]:
    """The first captions of the first samples of a table, each once, with their embeddings."""
    found: dict[str, PreviewPrompt] = {}
    for row in _rows_with_captions(table):
        shard_set = sources.sets[int(table.set_index[row])]
        record = shard_set.read(int(table.set_row[row]), captions=[0])
        texts = record.meta.captions
        text = texts[0] if texts else f"sample {table.sample_id(row)[:12]}"
        tensors = record.tensors
        found.setdefault(
            text, PreviewPrompt(text, tensors["prompt_embeds.0"], tensors["prompt_mask.0"])
        )
        if len(found) == FROM_CAPTIONS:
            break
    return list(found.values())


def _rows_with_captions(table: PlanTable) -> Iterator[int]:
    captions = table.token_offsets[1:] - table.token_offsets[:-1]
    return (row for row in range(len(table)) if captions[row])


def _latent_size(settings: Settings, table: PlanTable, family: Family) -> tuple[int, int]:
    size = settings.preview_size
    if size is None:
        buckets, counts = np.unique(table.bucket, axis=0, return_counts=True)
        size = [int(side) for side in buckets[counts.argmax()]]  # the smallest of equals
    height, width = size
    if height % family.image_multiple or width % family.image_multiple:
        near = [max(1, round(side / family.image_multiple)) for side in size]
        raise InputError(
            f"preview_size {size}: both sides must be multiples of {family.image_multiple} px; "
            f"{[side * family.image_multiple for side in near]} is the nearest"
        )
    return height // family.latent_scale, width // family.latent_scale
