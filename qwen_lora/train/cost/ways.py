"""How a step is run, what that costs and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_lora.families.base import Recompute
from qwen_lora.train.cost.copies import BESIDE_COPIES, Offloaded, Streamed, copying_seconds
from qwen_lora.train.cost.rates import Rates
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import Cost, StepModel

USUAL_SHARE = 0.75  # of the rate of products: what compiled steps reached on an H200


@dataclass(frozen=True)
class Way:
    """How a step is run."""

    recompute: Recompute
    on_device: int | None = None  # blocks, while the others are streamed; None: all stay
    # Where compiled blocks' activations are offloaded: blocks whose stay, besides the last ones.
    stay: int = 0

    def __str__(self) -> str:
        parts = [f"recompute {self.recompute}"]
        if self.on_device is not None:
            parts.append(f"{self.on_device} blocks on the device")
        if self.stay:
            parts.append(f"the activations of {self.stay} blocks not offloaded")
        return " and ".join(parts)


@dataclass(frozen=True)
class Pace:
    """How fast this machine is."""

    rates: Rates
    copies: float | None  # bytes a second between host and device

    def seconds(self, model: StepModel, shape: Shape, way: Way) -> float:
        """Of a forward and backward pass, at a usual share of the rates of products."""
        return pass_seconds(model, shape, way, self, USUAL_SHARE, BESIDE_COPIES)


def cost_of(model: StepModel, shape: Shape, way: Way) -> Cost:
    return model.cost(shape, way.recompute, way.on_device, way.stay)


def pass_seconds(
    model: StepModel,
    shape: Shape,
    way: Way,
    pace: Pace,
    share: float = 1.0,
    beside_copies: float = 0.0,
) -> float:
    """Of a forward and backward pass: its FLOPs at a share of the rates of products, so much longer
    in each direction for a streamed block, and what it waits for copies."""
    cost = cost_of(model, shape, way)
    forward = pace.rates.seconds(cost.forward_flops, cost.forward_low) / share
    backward = pace.rates.seconds(cost.backward_flops, cost.backward_low) / share
    streamed = offloaded = None
    if pace.copies and way.on_device is not None:
        copy = model.block_bytes / pace.copies
        streamed = Streamed(way.on_device, copy, beside_copies)
    if pace.copies and cost.offloaded:
        each = model.offloaded_bytes(shape, way.recompute)
        offloaded = Offloaded(way.stay, each / pace.copies)
    return copying_seconds(model.blocks, forward, backward, streamed, offloaded)
