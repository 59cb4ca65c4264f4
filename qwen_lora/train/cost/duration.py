# ruff: noqa: TID253
"""How long a step takes at the least: its FLOPs at the rates of products, and what it waits for the
copies of streamed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_lora.families.base import Recompute
from qwen_lora.train.cost.choice import GIB, Choice
from qwen_lora.train.cost.copies import copy_rate
from qwen_lora.train.cost.rates import Rates, find_rates
from qwen_lora.train.cost.shapes import BucketLoad, Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.ways import Pace, cost_of, pass_seconds

MOST_BUCKETS = 12  # whose FLOPs are counted; the others are taken for these


@dataclass(frozen=True)
class StepTime:
    flops: float
    low_flops: float  # those of them in 8 bits
    rates: Rates
    traffic: int  # bytes of weights copied to the GPU
    offloaded: int  # bytes of activations copied to the host, and back
    copies: float | None  # bytes a second
    copies_measured: bool
    seconds: float

    def facts(self, steps: int) -> dict[str, Any]:
        """As JSON values."""
        full, low = self.rates.full, self.rates.low
        return {
            "copied_gib_per_step": round(self.traffic / GIB, 6),
            "offloaded_gib_per_step": round(self.offloaded / GIB, 6),
            "copies_gb_per_s": None if self.copies is None else self.copies / 1e9,
            "copies_measured": self.copies_measured,
            "flops_per_step": self.flops,
            "flops_per_step_8bit": self.low_flops,
            "rate_tflops": full.flops / 1e12,
            "rate_measured": full.origin == "measured",
            "rate_8bit_tflops": low.flops / 1e12 if low else None,
            "rate_8bit_from": low.origin if low else None,
            "floor_seconds_per_step": self.seconds,
            "max_train_steps": steps,
            "floor_seconds": self.seconds * steps,
        }


def find_pace(
    model: StepModel,
    shape: Shape,
    usable: int | None,
    tflops: float | None = None,
    tflops_8bit: float | None = None,
    h2d: float | None = None,
) -> Pace:
    """As named (h2d in GB/s) or measured here; of copies only where `choose` asks for it."""
    cost = model.cost(shape, Recompute("full"))
    kind = model.settings.base_precision if cost.low_flops else None
    rates = find_rates(model.family, kind, tflops, tflops_8bit)
    streams = model.budgeted and usable is not None and cost.peak > usable
    return Pace(rates, copy_rate(bool(cost.offloaded) or streams, h2d))


def step_time(
    model: StepModel, loads: Sequence[BucketLoad], choice: Choice, pace: Pace, measured: bool
) -> StepTime:
    """The mean over an epoch. measured: whether the rate of copies is."""
    micro_batches = model.settings.gradient_accumulation_steps
    some = loads[:MOST_BUCKETS]
    flops = low = offloaded = seconds = 0.0
    for load in some:
        shape, visits = load.average(model.family), load.visits / load.batch
        cost = cost_of(model, shape, choice.way)
        flops += visits * cost.flops
        low += visits * cost.low_flops
        offloaded += visits * cost.offloaded
        seconds += visits * pass_seconds(model, shape, choice.way, pace)
    steps = sum(load.visits / load.batch for load in some) / micro_batches
    return StepTime(
        flops / steps,
        low / steps,
        pace.rates,
        micro_batches * choice.cost.traffic,
        round(offloaded / steps),
        pace.copies,
        measured and pace.copies is not None,
        seconds / steps,
    )
