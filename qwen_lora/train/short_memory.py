# ruff: noqa: TID253
"""What happens when GPU memory runs out, in a step, in a pass without gradients (validation,
previews) or in the optimizer: say what would fit, or go on with less."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.families.base import Recompute
from qwen_lora.families.streaming import RING
from qwen_lora.models import ModelFolder
from qwen_lora.train.cost.choice import (
    AUTO,
    GIB,
    Choice,
    blocks_that_fit,
    choice_of,
    choose,
    what_fits,
    with_streaming,
)
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.ways import Way, cost_of
from qwen_lora.train.data import LoadedBatch
from qwen_lora.train.transformer import forward_options

LESS = 0.95  # of the predicted peak of what did not fit
FULL = Recompute("full")  # what comes nearest to a pass without gradients
T = TypeVar("T")


class ShortMemory:
    """The planner at hand during training. `way` is how the transformer runs now."""

    def __init__(
        self,
        settings: Settings,
        model: ModelFolder,
        transformer: Any,
        way: Way,
        dtype: torch.dtype,
        parts: int = 1,
        process: str = "",
    ) -> None:
        """process: what lines on stderr begin with, where there are several."""
        self.way = way
        self._process = process
        self._settings, self._model, self._transformer = settings, model, transformer
        self._dtype, self._parts = dtype, parts

    def may_give_way(self) -> bool:
        return self._settings.oom_fallback and self._parts == 1

    def error(self, step: int, batch: LoadedBatch) -> QwenLoraError:
        """One line: what did not fit, and the settings that would."""
        shape = shape_of(batch)
        model = StepModel(self._model, self._settings, self._dtype, self._parts)
        peak = cost_of(model, shape, self.way).peak
        found = []
        if (choice := self._next(shape)) is not None:
            found.append(self._as_settings(choice.way))
        found += [text for text in what_fits(model, shape, int(LESS * peak)) if text not in found]
        advice = f"would fit, it predicts: {'; or '.join(found)}" if found else "no setting fits"
        scale = self._model.family.latent_scale
        height, width = (side * scale for side in shape.latent_size)
        return QwenLoraError(
            f"step {step + 1}: the GPU's memory is too small for a micro-batch of {batch.size} x "
            f"{height} x {width} px with {max(shape.text_tokens)} text tokens and {self.way} "
            f"(`plan` predicts a peak of {peak / GIB:.2f} GiB); {advice}. Checkpoints are intact"
        )

    def give_way(self, step: int, batch: LoadedBatch) -> None:
        """Go over to the planner's next choice: more recomputation, then fewer blocks on the
        device. None of that changes a bit of the result unless blocks are compiled. Raises the
        error when there is none."""
        self._collect()
        choice = self._next(shape_of(batch))
        if choice is None:
            raise self.error(step, batch)
        predicted = f" (predicted peak {choice.cost.peak / GIB:.2f} GiB)"
        self._go_over(f"step {step + 1}", choice.way, predicted)

    def without_gradients(self, what: str, shape: Shape, work: Callable[[], T], instead: str) -> T:
        """Do a pass that keeps nothing for a backward one; with `oom_fallback` again, with fewer
        blocks on the device, as long as memory is too small. Otherwise raises one line. what: this
        pass; instead: settings that avoid it."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                beside = self._beside_weights(shape)
                way = self._fewer_blocks(beside, int(LESS * (self._held() + beside)))
                if way is None or not self.may_give_way():
                    raise self._pass_error(what, beside, way, instead) from error
            self._collect()
            self._go_over(what, way)

    def optimizer(self, what: str, work: Callable[[], T], again: bool = True) -> T:
        """Make the optimizer's state, or update with it: the same as `without_gradients`. again:
        whether work that ran out of memory may be done again."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                model = self._free_planner
                all_held = self._held() + model.lora_bytes
                limit = all_held - model.state_bytes  # of that, there was room for the rest
                way = self._fewer_blocks(model.lora_bytes, min(limit, int(LESS * all_held)))
                if way is None or not again or not self.may_give_way():
                    raise self._optimizer_error(what, limit, way) from error
            self._collect()
            self._go_over(what, way)

    def _pass_error(self, what: str, beside: int, way: Way | None, instead: str) -> QwenLoraError:
        limit = LESS * (self._held() + beside)
        precisions = [
            f"base_precision: {name}"
            for name, other in self._other_precisions()
            if beside + self._held(other) <= limit
        ]
        return self._too_small(what, way, [*precisions, instead])

    def _optimizer_error(self, what: str, limit: int, way: Way | None) -> QwenLoraError:
        found = [
            f"base_precision: {name}"
            for name, other in self._other_precisions()
            if other.lora_bytes + self._held(other) <= limit
        ]
        half = self._settings.rank // 2
        half -= half % 2 if self._settings.lora_init == "orthogonal" else 0
        if half and self._planner(rank=half).lora_bytes + self._held() <= limit:
            found.append(f"rank: {half}")
        return self._too_small(what, way, found)

    def _too_small(self, what: str, way: Way | None, found: list[str]) -> QwenLoraError:
        if way is not None:
            found = [f"blocks_on_device: {way.on_device}", *found]
        held = self._held() + self._free_planner.lora_bytes
        return QwenLoraError(
            f"the GPU's memory is too small for {what} with {self.way} (`plan` predicts "
            f"{held / GIB:.2f} GiB for the weights and the LoRA alone); "
            + (f"set {'; or '.join(found)}" if found else "no setting that was tried fits")
            + ". Checkpoints are intact"
        )

    def _other_precisions(self) -> Iterator[tuple[str, StepModel]]:
        for name in ("fp8", "int8", "nf4") if self._parts == 1 else ():
            yield name, self._planner(base_precision=name, low_precision_products="none")

    def _planner(self, **changes: Any) -> StepModel:
        settings = self._settings.model_copy(update=changes)
        return StepModel(self._model, settings, self._dtype, self._parts)

    @torch.enable_grad()  # the planner traces steps
    def _beside_weights(self, shape: Shape) -> int:
        """Bytes at the worst moment of a pass without gradients, as the planner knows it."""
        cost = self._free_planner.cost(shape, FULL)
        return cost.peak - cost.weights

    def _held(self, model: StepModel | None = None) -> int:
        """Bytes of weights on the device as it runs now; model: of another model's."""
        model, on_device = model or self._free_planner, self.way.on_device
        streamed = 0 if on_device is None else model.blocks - on_device
        return model.weight_bytes - max(0, streamed - RING) * model.block_bytes

    def _fewer_blocks(self, beside: int, limit: int) -> Way | None:
        """So many on the device as `limit` bytes hold, with `beside` besides weights. Recomputing
        more frees nothing where nothing is kept for a backward pass."""
        model, held = self._free_planner, self.way.on_device
        if model.parts > 1 or not self._settings.own_forward or model.blocks <= RING or held == 0:
            return None
        wanted = blocks_that_fit(model, model.weight_bytes + beside, limit) or 0
        on_device = wanted if held is None else min(held - 1, wanted)
        streamed = model.blocks - on_device
        return Way(with_streaming(self._settings, self.way.recompute, streamed), on_device)

    def _collect(self) -> None:
        gc.collect()  # the graph of the pass that failed
        if self._transformer_is_on_gpu():
            torch.cuda.empty_cache()

    def _go_over(self, what: str, way: Way, predicted: str = "") -> None:
        rounding = self._settings.compile_blocks is True
        print(
            f"{self._process}{what}: out of GPU memory with {self.way}; going on with {way}"
            + predicted
            + "; compiled blocks round a little differently so" * rounding,
            file=sys.stderr,
        )
        self.way = way
        options = forward_options(self._settings, way.recompute, way.on_device, way.stay)
        self._model.family.prepare_training(self._transformer, options)

    def _next(self, shape: Shape) -> Choice | None:
        """The best way that takes less than the one that did not fit."""
        model = self._free_planner
        now = cost_of(model, shape, self.way).peak
        limit = int(LESS * now)
        choice = choose(model, shape, limit)
        if (held := self.way.on_device) is not None:  # streamed blocks stay streamed
            wanted = choice.way.on_device
            on_device = held if wanted is None else min(held, wanted)
            choice = choice_of(model, shape, Way(choice.recompute, on_device), limit)
        return choice if choice.cost.peak < now else None

    @cached_property
    def _free_planner(self) -> StepModel:
        """Free to choose, whatever the settings name."""
        free = {"gradient_checkpointing": True, "recompute": AUTO, "blocks_on_device": AUTO}
        return self._planner(**free)

    def _as_settings(self, way: Way) -> str:
        found = [f"recompute: {way.recompute.blocks or way.recompute.kind}"]
        if way.on_device is not None:
            found.insert(0, f"blocks_on_device: {way.on_device}")
        if not self._settings.gradient_checkpointing:
            found.insert(0, "gradient_checkpointing: true")
        return " with ".join(found)

    def _transformer_is_on_gpu(self) -> bool:
        return any(parameter.is_cuda for parameter in self._transformer.parameters())


def shape_of(batch: LoadedBatch) -> Shape:
    height, width = batch.latents.shape[-2:]
    return Shape((height, width), tuple(len(embeds) for embeds in batch.prompt_embeds))
