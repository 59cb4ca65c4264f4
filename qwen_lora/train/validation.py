# ruff: noqa: TID253
"""A loss that can be compared: fixed images, fixed noise, fixed noise levels.

With `validation_fraction` it is measured on images that training never sees (`validation_loss`),
otherwise on a few training images (`fixed_train_loss`). Images are held out by the hash of their
source file, all their records together, whatever the seed and however the set grows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from qwen_lora.train.data import BatchLoader, LoadedBatch
from qwen_lora.train.plan import UNCONDITIONAL, MicroBatch, PlanTable, Visit
from qwen_lora.train.randomness import Purpose, mix_int, noise
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.short_memory import ShortMemory, shape_of
from qwen_lora.train.step import SampleLosses

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # medians of five equal parts of the uniform density
FEW_IMAGES = 20  # fewer make a noisy curve
FIXED_TRAIN_IMAGES = 8  # the measure without a split must stay cheap: 8 x 5 forward passes
_UNIT = 2.0**-64


def hold_out(sources: Iterable[str], fraction: float) -> frozenset[str]:
    """Which of `sources` (source sha256s) to keep out of training: those whose hash falls below
    `fraction`, at least one when a fraction is asked for."""
    if fraction == 0:
        return frozenset()
    by_hash = sorted(sources, key=_source_hash)
    held = [source for source in by_hash if _source_hash(source) * _UNIT < fraction]
    return frozenset(held or by_hash[:1])


def chosen_sources(sources: Iterable[str], count: int) -> frozenset[str]:
    """At most `count` of `sources`, the same ones whatever else is there."""
    return frozenset(sorted(sources, key=_source_hash)[:count])


def _source_hash(source_sha256: str) -> int:
    return mix_int(int(source_sha256[:16], 16), Purpose.VALIDATION_SPLIT)


class Measure:
    """The mean loss over fixed samples at fixed noise levels. Ranks share the samples."""

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        losses: SampleLosses,
        table: PlanTable,
        loader: BatchLoader,
        memory: ShortMemory,
        in_step: bool = False,
        compiled: bool = False,
    ) -> None:
        """in_step: every rank has to run the transformer equally often. compiled: passes go through
        the graphs of training, with gradients that nobody asks for, instead of their own."""
        self.name = name  # validation_loss or fixed_train_loss
        self._memory, self._in_step, self._compiled = memory, in_step, compiled
        self._ranks, self._table, self._loader = ranks, table, loader
        self._losses = SampleLosses(losses.transformer, losses.family, weighting="none")

    def run(self, should_stop: Callable[[], int]) -> dict[str, float] | None:
        """{name: mean, name_at_<sigma>: mean, ...}; None when a stop was asked for on any rank.

        Every rank adds its own samples to a table of zeros; the sum is the same for any number of
        ranks, to the last bit.
        """
        samples, world = len(self._table), self._ranks.world
        values = torch.zeros(samples, len(SIGMAS), dtype=torch.float64)
        was_training = self._losses.transformer.training
        self._losses.transformer.eval()  # no LoRA dropout
        try:
            for first in range(0, samples, world):
                row = first + self._ranks.rank
                failure: Exception | None = None
                try:
                    if row < samples:
                        values[row] = self._sample(row)
                    elif self._in_step:
                        self._sample(first)  # with the others, for nothing
                except Exception as error:
                    if self._in_step:  # the others are in the middle of it: the lifeline tells them
                        raise
                    failure = error
                if self._ranks.agree(failure, should_stop()):
                    return None
        finally:
            self._losses.transformer.train(was_training)
        by_sigma = self._ranks.sum_on_host(values).mean(dim=0).tolist()
        result = {self.name: sum(by_sigma) / len(by_sigma)}
        for sigma, value in zip(SIGMAS, by_sigma, strict=True):
            result[f"{self.name}_at_{sigma}"] = value
        return result

    @torch.no_grad()
    def _sample(self, row: int) -> torch.Tensor:
        """Losses of one sample, first caption, batch size 1. [S] float64 on the CPU."""
        batch, (height, width) = self._load(row), self._table.bucket[row].tolist()
        return self._memory.without_gradients(
            f"the {self.name} of a sample of {height} x {width} px",
            shape_of(batch),
            lambda: self._losses_of(batch),
            "validation_steps: 0",
        )

    def _losses_of(self, batch: LoadedBatch) -> torch.Tensor:
        losses = []
        for index, sigma in enumerate(SIGMAS):
            shape = tuple(batch.latents.shape[1:])
            drawn = noise(0, 0, batch.sample_ids[0], index, shape, Purpose.VALIDATION_NOISE)
            at_sigma = replace(
                batch,
                noise=torch.from_numpy(drawn)[None],  # [1, C, h, w] float32
                sigmas=torch.tensor([sigma], dtype=torch.float32),
            )
            with torch.set_grad_enabled(self._compiled):
                losses.append(self._losses(at_sigma.to(self._ranks.device)).detach())
        return torch.cat(losses).double().cpu()

    def _load(self, row: int) -> LoadedBatch:
        captions = self._table.token_offsets[row + 1] - self._table.token_offsets[row]
        height, width = self._table.bucket[row].tolist()
        visit = Visit(row=row, visit=0, caption=0 if captions else UNCONDITIONAL)
        return self._loader.load(MicroBatch((visit,), (height, width)), epoch=0)


def report_split(held: frozenset[str], total: int) -> None:
    """Say how many of `total` images are held out; warn when they are few."""
    print(f"held out for validation: {len(held)} of {total} images", file=sys.stderr)
    if len(held) < FEW_IMAGES:
        print(
            f"warning: {len(held)} held-out images make a noisy validation loss; "
            f"{FEW_IMAGES} or more are better (validation_fraction)",
            file=sys.stderr,
        )
