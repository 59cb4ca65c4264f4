# ruff: noqa: TID253
"""How long a step takes at the least: its FLOPs at the rates of products, and what it waits for the
copies of streamed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import Recompute
from qwen_lora.train.cost.choice import GIB, Choice, Pace, waiting_seconds
from qwen_lora.train.cost.copies import copy_rate, streamed_seconds
from qwen_lora.train.cost.rates import Rates, find_rates
from qwen_lora.train.cost.shapes import BucketLoad, Shape
from qwen_lora.train.cost.step import StepModel

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
    tflops: float | None = None,
    tflops_8bit: float | None = None,
    h2d: float | None = None,
) -> Pace | None:
    """As named or measured here, where the choice depends on it; None where it does not."""
    full = Recompute("full")
    if not model.stays(shape, full):
        return None
    cost = model.cost(shape, full)
    kind = model.settings.base_precision if cost.low_flops else None
    copies = copy_rate(cost.offloaded, h2d)
    return Pace(find_rates(model.family, kind, tflops, tflops_8bit), copies)


def step_time(
    model: StepModel,
    settings: Settings,
    loads: Sequence[BucketLoad],
    shape: Shape,
    choice: Choice,
    tflops: float | None,
    tflops_8bit: float | None,
    h2d: float | None,
) -> StepTime:
    """shape: the largest micro-batch. tflops, tflops_8bit, h2d (GB/s): rates as named; None:
    measured here."""
    micro_batches, cost = settings.gradient_accumulation_steps, choice.cost
    flops, low = _mean_flops(model, loads, choice.recompute)
    rates = find_rates(model.family, settings.base_precision if low else None, tflops, tflops_8bit)
    traffic = micro_batches * cost.traffic
    copies = copy_rate(traffic + cost.offloaded, h2d)
    seconds = rates.seconds(flops, low)
    forward = seconds * rates.seconds(cost.forward_flops, cost.forward_low)
    forward /= rates.seconds(cost.flops, cost.low_flops)
    if copies and cost.offloaded:
        seconds = waiting_seconds(model, shape, choice.way, forward, seconds - forward, copies)
    elif copies and choice.way.on_device is not None:
        seconds = streamed_seconds(
            model.blocks,
            choice.way.on_device,
            forward,
            seconds - forward,
            model.block_bytes / copies,
        )
    measured = h2d is None and copies is not None
    return StepTime(
        micro_batches * flops,
        micro_batches * low,
        rates,
        traffic,
        micro_batches * cost.offloaded,
        copies,
        measured,
        micro_batches * seconds,
    )


def _mean_flops(
    model: StepModel, loads: Sequence[BucketLoad], recompute: Recompute
) -> tuple[float, float]:
    """Of one micro-batch, over an epoch; and those of them in 8 bits."""
    some = loads[:MOST_BUCKETS]
    micro_batches = sum(load.visits / load.batch for load in some)
    total = low = 0.0
    for load in some:
        cost = model.cost(load.average(model.family), recompute)
        total += load.visits / load.batch * cost.flops
        low += load.visits / load.batch * cost.low_flops
    return total / micro_batches, low / micro_batches
