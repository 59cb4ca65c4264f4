"""What the backward pass computes anew: the cheapest way that fits the device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import Recompute
from qwen_lora.train.cost.shapes import Shape, latent_size
from qwen_lora.train.cost.step import Cost, StepModel

GIB = 1 << 30
AUTO = "auto"
SIDES = (512, 768, 1024, 1328)  # px, of the images that are offered
# Kept free for what is not counted: the driver's context, the libraries' workspaces, gaps between
# blocks of memory.
RESERVE, RESERVE_SHARE = GIB, 0.05


@dataclass(frozen=True)
class Choice:
    recompute: Recompute
    cost: Cost
    usable: int | None  # bytes; None: no limit is known

    @property
    def missing(self) -> int:
        """Bytes by which it does not fit."""
        return 0 if self.usable is None else max(0, self.cost.peak - self.usable)


def usable_bytes(total: int, free: int | None = None) -> int:
    """Of a device with so much memory, of which `free` bytes are free."""
    return (total if free is None else free) - int(max(RESERVE, RESERVE_SHARE * total))


def fixed_recompute(settings: Settings) -> Recompute | None:
    """What the settings say by themselves; None: it is to be chosen. diffusers' own forward pass
    knows no other way than full or none."""
    if not settings.gradient_checkpointing:
        return Recompute("none")
    if settings.recompute == AUTO:
        return None if settings.own_forward else Recompute("full")
    return Recompute.parse(settings.recompute)


def choose(model: StepModel, shape: Shape, usable: int | None) -> Choice:
    """The way with the fewest FLOPs whose peak fits `usable` bytes; full if none does, or if no
    limit is known. Settings that name a way are obeyed."""
    fixed = fixed_recompute(model.settings)
    if fixed is None and usable is None:
        fixed = Recompute("full")
    if fixed is not None:
        return Choice(fixed, model.cost(shape, fixed), usable)
    choices = [Choice(one, model.cost(shape, one), usable) for one in _ways(model, shape, usable)]
    fitting = [choice for choice in choices if not choice.missing]
    # In the order of `_ways` where FLOPs are equal.
    return min(fitting, key=lambda choice: choice.cost.flops) if fitting else choices[-1]


def _ways(model: StepModel, shape: Shape, usable: int | None) -> Iterator[Recompute]:
    # Not selective: on an H200 it took longer than recomputing whole blocks (docs/speed.md).
    yield Recompute("none")
    for blocks in range(1, model.blocks):
        some = Recompute("some", blocks)
        if usable is None or model.cost(shape, some).peak <= usable:
            yield some
            break
    yield Recompute("full")


def too_small(model: StepModel, shape: Shape, choice: Choice) -> str:
    """One line: by how much, and what to do."""
    assert choice.usable is not None
    line = (
        f"the predicted peak is {choice.cost.peak / GIB:.2f} GiB with recompute "
        f"{choice.recompute}, {choice.missing / GIB:.2f} GiB more than the "
        f"{choice.usable / GIB:.2f} GiB that are usable"
    )
    found = what_fits(model, shape, choice.usable)
    return f"{line}; would fit: {', '.join(found) if found else 'none of the settings tried'}"


def what_fits(model: StepModel, shape: Shape, usable: int) -> list[str]:
    """Changes of one thing with which it fits."""
    settings, family = model.settings, model.family

    def fits(to: Shape, **changes: Any) -> bool:
        changed = settings.model_copy(update={"gradient_checkpointing": True, **changes})
        cost = StepModel(model.model, changed, model.dtype, model.parts).cost(to, Recompute("full"))
        return cost.peak <= usable

    found = []
    if fixed_recompute(settings) not in (None, Recompute("full")) and fits(shape):
        found.append("gradient_checkpointing: true with recompute: full")
    for precision in ("fp8", "int8", "nf4") if model.parts == 1 else ():
        changes = {"base_precision": precision, "low_precision_products": "none"}
        if precision != settings.base_precision and fits(shape, **changes):
            found.append(f"base_precision: {precision}")
    if shape.batch > 1 and fits(Shape(shape.latent_size, shape.text_tokens[:1])):
        found.append("train_batch_size: 1" + (", batch_pixels: 0" * (settings.batch_pixels > 0)))
    for side in reversed(SIDES):
        smaller = latent_size(family, (side, side))
        if family.image_tokens(smaller) < family.image_tokens(shape.latent_size) and fits(
            Shape(smaller, shape.text_tokens)
        ):
            found.append(f"images of {side} x {side} px")
            break
    return found
