"""The micro-batches that shards give, by size. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_lora.families.base import Family
from qwen_lora.train.plan import BatchRule
from qwen_lora.train.table import PlanTable


@dataclass(frozen=True)
class Shape:
    """One micro-batch: latents [B, C, h, w] and prompts of B lengths."""

    latent_size: tuple[int, int]
    text_tokens: tuple[int, ...]

    @property
    def batch(self) -> int:
        return len(self.text_tokens)


@dataclass(frozen=True)
class BucketLoad:
    """The samples of one bucket."""

    bucket: tuple[int, int]  # pixels, [height, width]
    visits: float  # an epoch
    batch: int  # samples of its largest micro-batch
    longest: int  # text tokens
    mean: float
    equal: bool  # all prompts have the same length

    def largest(self, family: Family) -> Shape:
        """The longest prompt for each sample. Prompts of different lengths cost a little more than
        equal ones: where they may meet, one is shorter by a token."""
        texts = [self.longest] * self.batch
        if self.batch > 1 and not self.equal:
            texts[-1] = max(1, self.longest - 1)
        return Shape(latent_size(family, self.bucket), tuple(texts))

    def average(self, family: Family) -> Shape:
        texts = (max(1, round(self.mean)),) * self.batch
        return Shape(latent_size(family, self.bucket), texts)


def latent_size(family: Family, bucket: tuple[int, int]) -> tuple[int, int]:
    return bucket[0] // family.latent_scale, bucket[1] // family.latent_scale


def bucket_loads(table: PlanTable, rule: BatchRule) -> list[BucketLoad]:
    """One for each bucket, the most frequent first."""
    buckets, bucket_of = np.unique(table.bucket, axis=0, return_inverse=True)
    bucket_of = bucket_of.reshape(-1)
    captions = np.diff(table.token_offsets)
    owner = np.repeat(np.arange(len(table)), captions)
    most = rule.sizes(buckets)
    empty = table.unconditional_tokens[table.set_index]  # [N]
    loads = []
    for index, (height, width) in enumerate(buckets.tolist()):
        rows = np.flatnonzero(bucket_of == index)
        tokens = table.token_counts[bucket_of[owner] == index]
        without = rows if rule.caption_dropout_rate > 0 else rows[captions[rows] == 0]
        every = np.concatenate([tokens, empty[without]])
        visits = float(table.weight[rows].sum())
        loads.append(
            BucketLoad(
                bucket=(height, width),
                visits=visits,
                # A weight of 1.5 may give two visits in one epoch.
                batch=min(int(most[index]), int(np.ceil(table.weight[rows]).sum())),
                longest=int(every.max()),
                mean=float((tokens if len(tokens) else every).mean()),
                equal=bool((every == every[0]).all()),
            )
        )
    return sorted(loads, key=lambda load: (-load.visits, load.bucket))


def largest_load(loads: Sequence[BucketLoad], family: Family) -> BucketLoad:
    """The one with the most tokens in a micro-batch; image and text tokens cost about the same."""

    def tokens(load: BucketLoad) -> int:
        return load.batch * (family.image_tokens(latent_size(family, load.bucket)) + load.longest)

    return max(loads, key=tokens)
