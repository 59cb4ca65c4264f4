"""What the backward pass computes anew, and how many blocks' weights stay on the device: the
cheapest way that fits its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import Recompute
from qwen_lora.families.offload import COMPILED
from qwen_lora.families.streaming import RING
from qwen_lora.train.cost.shapes import Shape, latent_size
from qwen_lora.train.cost.step import Cost, StepModel, has_budget
from qwen_lora.train.cost.ways import Pace, Way, cost_of

GIB = 1 << 30
AUTO = "auto"
SIDES = (512, 768, 1024, 1328)  # px, of the images that are offered
# Kept free for what is not counted: the driver's context, the libraries' workspaces, gaps between
# blocks of memory.
RESERVE, RESERVE_SHARE = GIB, 0.05
# Of the blocks, recomputed (compiled ones keep the memory of the others) and streamed: what is
# tried where they are compiled. Each memory budget takes its time to compile.
RECOMPUTED = (0.5, 0.75, 0.9)
RECOMPUTED_OFFLOADED = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
STREAMED = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
# Of the time: on an H200 a streamed block cost 1 to 3 ms even where its copy was hidden.
WORTH = 0.95


@dataclass(frozen=True)
class Choice:
    way: Way
    cost: Cost
    usable: int | None  # bytes; None: no limit is known

    @property
    def recompute(self) -> Recompute:
        return self.way.recompute

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


def fixed_way(settings: Settings, blocks: int) -> Way | None:
    """What the settings say by themselves, where no memory is known."""
    recompute = fixed_recompute(settings)
    streamed = _streamed(settings, blocks)
    if streamed:
        return Way(with_streaming(settings, recompute, streamed), blocks - streamed)
    return Way(recompute) if recompute is not None else None


def choose(model: StepModel, shape: Shape, usable: int | None, pace: Pace | None = None) -> Choice:
    """The way that takes the least time (if no pace is known: the fewest FLOPs) of those whose peak
    fits `usable` bytes with all blocks on the device; if none fits, full recomputation with as many
    of them there as fit, or of compiled blocks fewer of them and more of what they keep. Settings
    that name a way are obeyed. Where no limit is known, full with all of them."""
    settings = model.settings
    if usable is None:
        return choice_of(
            model, shape, fixed_way(settings, model.blocks) or Way(Recompute("full")), None
        )
    choices = [
        _most_staying(model, shape, way, usable)
        for way in _ways(model, shape, pace is not None and pace.copies is not None)
    ]
    fitting = [choice for choice in choices if not choice.missing]
    if fitting:  # the first of several that take as long
        if pace is None:
            return min(fitting, key=lambda choice: choice.cost.flops)
        return min(fitting, key=lambda choice: pace.seconds(model, shape, choice.way))
    if settings.blocks_on_device != AUTO or not settings.own_forward or model.parts > 1:
        return choices[-1]
    if pace is not None and pace.copies is not None and model.budgeted:
        return _trade(model, shape, [choice.recompute for choice in choices], usable, pace)
    if choices[-1].recompute.kind in ("full", "selective"):
        return most_on_device(model, shape, choices[-1].recompute, usable)
    return choices[-1]


def _ways(model: StepModel, shape: Shape, copies_known: bool) -> Iterator[Way]:
    """With as many blocks on the device as the settings name, or all."""
    settings = model.settings
    streamed = _streamed(settings, model.blocks)
    on_device = model.blocks - streamed if streamed else None
    fixed = fixed_recompute(settings)
    if fixed is not None:
        yield Way(with_streaming(settings, fixed, streamed), on_device)
    elif streamed and not has_budget(settings):
        yield Way(Recompute("some", streamed), on_device)
        yield Way(Recompute("full"), on_device)
    else:
        # Not selective: on an H200 it took longer than recomputing whole blocks (docs/speed.md).
        yield Way(Recompute("none"), on_device)
        for blocks in _counts(model, copies_known):
            yield Way(Recompute("some", blocks), on_device)
        yield Way(Recompute("full"), on_device)


def _counts(model: StepModel, copies_known: bool) -> list[int]:
    """Numbers of recomputed blocks that are tried."""
    if model.settings.compile_blocks is not True:
        return list(range(1, model.blocks))
    shares: tuple[float, ...] = RECOMPUTED
    if model.settings.offload_activations:
        # To copy what a budget keeps may take longer than computing it.
        shares = RECOMPUTED_OFFLOADED if copies_known else ()
    found = {round(share * model.blocks) for share in shares}
    return sorted(found - {0, model.blocks})


def _most_staying(model: StepModel, shape: Shape, way: Way, usable: int) -> Choice:
    """Where compiled blocks' activations are offloaded, as many stay as fit: the fewest copies."""
    least = choice_of(model, shape, way, usable)
    if not model.stays(way.recompute) or least.missing:
        return least
    each = model.offloaded_bytes(shape, way.recompute)
    stay = min(max(0, model.blocks - COMPILED), (usable - least.cost.peak) // each)
    return choice_of(model, shape, replace(way, stay=stay), usable)


def _trade(
    model: StepModel, shape: Shape, recomputes: Sequence[Recompute], usable: int, pace: Pace
) -> Choice:
    """As many compiled blocks on the device as fit with the most recomputation, or fewer for what
    others keep where that takes clearly less time."""

    def seconds(choice: Choice) -> float:
        return pace.seconds(model, shape, choice.way)

    most = most_on_device(model, shape, recomputes[-1], usable)
    found = [
        _most_staying(model, shape, Way(recompute, model.blocks - streamed), usable)
        for streamed in sorted({round(share * model.blocks) for share in STREAMED})
        for recompute in recomputes
        if streamed > RING
    ]
    best = min((each for each in found if not each.missing), key=seconds, default=most)
    return best if most.missing or seconds(best) < WORTH * seconds(most) else most


def most_on_device(model: StepModel, shape: Shape, recompute: Recompute, usable: int) -> Choice:
    """As many blocks on the device as fit; none if nothing fits."""
    whole = model.cost(shape, recompute)
    if model.blocks <= RING or whole.peak <= usable:
        return Choice(Way(recompute), whole, usable)
    way = Way(recompute, blocks_that_fit(model, whole.peak, usable) or 0)
    return choice_of(model, shape, way, usable)


def blocks_that_fit(model: StepModel, peak: int, usable: int) -> int | None:
    """How many blocks may stay on the device where the peak is `peak` with all of them; None if it
    does not fit without any either."""
    if peak <= usable:
        return model.blocks
    streamed = RING + -(-(peak - usable) // model.block_bytes)
    return model.blocks - streamed if streamed <= model.blocks else None


def choice_of(model: StepModel, shape: Shape, way: Way, usable: int | None) -> Choice:
    return Choice(way, cost_of(model, shape, way), usable)


def _streamed(settings: Settings, blocks: int) -> int:
    """Blocks that the settings ask to stream."""
    named = settings.blocks_on_device
    return max(0, blocks - int(named)) if named.isdecimal() else 0


def with_streaming(settings: Settings, recompute: Recompute | None, streamed: int) -> Recompute:
    """Streamed blocks are recomputed, whatever else is, unless compiled ones have a memory
    budget."""
    if not streamed or has_budget(settings):
        return recompute or Recompute("full")
    if recompute is None or recompute.kind == "some":
        return Recompute("full")
    return Recompute("some", streamed) if recompute.kind == "none" else recompute


def too_small(model: StepModel, shape: Shape, choice: Choice) -> str:
    """One line: by how much, and what to do."""
    assert choice.usable is not None
    line = (
        f"the predicted peak is {choice.cost.peak / GIB:.2f} GiB with {choice.way}, "
        f"{choice.missing / GIB:.2f} GiB more than the "
        f"{choice.usable / GIB:.2f} GiB that are usable"
    )
    found = what_fits(model, shape, choice.usable)
    return f"{line}; would fit: {', '.join(found) if found else 'none of the settings tried'}"


def what_fits(model: StepModel, shape: Shape, usable: int) -> list[str]:
    """Changes of one thing with which it fits."""
    settings, family = model.settings, model.family

    named = settings.blocks_on_device
    can_stream = settings.own_forward and model.parts == 1
    fewest = 0 if can_stream and named == AUTO else None
    if named.isdecimal():
        fewest = int(named)

    def fits(to: Shape, **changes: Any) -> bool:
        other = model
        if changes:  # else what is known of this one holds
            changed = settings.model_copy(update=changes)
            other = StepModel(model.model, changed, model.dtype, model.parts)
        return other.cost(to, Recompute("full"), fewest).peak <= usable

    found = []
    if can_stream:
        most = most_on_device(model, shape, Recompute("full"), usable)
        if most.way.on_device is not None and named != AUTO and not most.missing:
            found.append(f"blocks_on_device: {most.way.on_device} with recompute: full")
    if settings.own_forward and not settings.offload_activations:
        if fits(shape, offload_activations=True):
            found.append("offload_activations: true")
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
