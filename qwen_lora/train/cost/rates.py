# ruff: noqa: TID253
"""How fast matrix products run here, and how long FLOPs take at the least."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from qwen_lora.errors import InputError
from qwen_lora.families.base import Family

# What data sheets of tensor cores say of products in 8 bits beside 16. Taken where no rate
# is known: on an H200 fp8 reached 1.8 to 1.9 times the other, int8 0.8 to 0.9 (docs/cards.md).
NOMINAL = 2.0


@dataclass(frozen=True)
class Rate:
    flops: float  # a second
    origin: Literal["measured", "given", "assumed"]


@dataclass(frozen=True)
class Rates:
    full: Rate  # of products in the compute dtype
    low: Rate | None  # of products in 8 bits; None: there are none

    def seconds(self, flops: float, low_flops: float) -> float:
        """At the least. low_flops: those of `flops` that are in 8 bits."""
        low = low_flops / self.low.flops if self.low else 0.0
        return (flops - low_flops) / self.full.flops + low


def find_rates(
    family: Family,
    kind: str | None,
    tflops: float | None = None,
    tflops_8bit: float | None = None,
) -> Rates:
    """As named, or measured on this machine's GPU, or its CPU. kind: of products in 8 bits, fp8 or
    int8; None: there are none."""
    full = Rate(measure_rate(), "measured") if tflops is None else Rate(tflops * 1e12, "given")
    if kind is None:
        return Rates(full, None)
    if tflops_8bit is not None:
        return Rates(full, Rate(tflops_8bit * 1e12, "given"))
    # What is named is another machine's, or may be: nothing that runs here tells of it.
    low = measure_low_rate(family, kind) if tflops is None else None
    if low is None:
        return Rates(full, Rate(NOMINAL * full.flops, "assumed"))
    return Rates(full, Rate(low, "measured"))


def measure_rate() -> float:
    """FLOP/s of matrix products on this machine's GPU in bfloat16, or on its CPU in float32."""
    device, side = _machine()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(side, side, device=device, dtype=dtype)
    return _best(lambda: a @ a, side)


def measure_low_rate(family: Family, kind: str) -> float | None:
    """FLOP/s of a family's products in 8 bits; None where they do not run."""
    device, side = _machine()
    try:
        return _best(family.low_precision_product(kind, side, device), side)
    except InputError:
        return None


def _machine() -> tuple[torch.device, int]:
    """Where, and with factors of which side."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), 8192 if on_gpu else 1024


def _best(product: Callable[[], torch.Tensor], side: int) -> float:
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        float(product()[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
