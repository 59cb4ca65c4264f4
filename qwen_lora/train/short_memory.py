# ruff: noqa: TID253
"""What happens when GPU memory runs out, in a step or in a pass without gradients (validation,
previews): say what would fit, or go on with less."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
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
    Way,
    choice_of,
    choose,
    most_on_device,
    what_fits,
    with_streaming,
)
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
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
        peak = choice_of(model, shape, self.way, None).cost.peak
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
                way = self._fewer_blocks(shape)
                if way is None or not self.may_give_way():
                    raise self._pass_error(what, shape, way, instead) from error
            self._collect()
            self._go_over(what, way)

    @torch.enable_grad()
    def _pass_error(self, what: str, shape: Shape, way: Way | None, instead: str) -> QwenLoraError:
        cost = self._free_planner.cost(shape, FULL, self.way.on_device)
        found = [f"blocks_on_device: {way.on_device}"] if way is not None else []
        for precision in ("fp8", "int8", "nf4") if self._parts == 1 else ():
            changes = {"base_precision": precision, "low_precision_products": "none"}
            other = StepModel(
                self._model, self._settings.model_copy(update=changes), self._dtype, self._parts
            )
            if cost.peak - cost.weights + self._held(other) <= LESS * cost.peak:
                found.append(f"base_precision: {precision}")
        found.append(instead)
        return QwenLoraError(
            f"the GPU's memory is too small for {what} with {self.way} (`plan` predicts "
            f"{(cost.weights + cost.lora) / GIB:.2f} GiB for the weights and the LoRA alone); set "
            f"{'; or '.join(found)}. Checkpoints are intact"
        )

    def _held(self, model: StepModel) -> int:
        """Bytes of weights on the device as it runs now."""
        on_device = self.way.on_device
        streamed = 0 if on_device is None else model.blocks - on_device
        return model.weight_bytes - max(0, streamed - RING) * model.block_bytes

    @torch.enable_grad()  # the planner traces steps
    def _fewer_blocks(self, shape: Shape) -> Way | None:
        """Recomputing more frees nothing for a pass without gradients."""
        model, held = self._free_planner, self.way.on_device
        if model.parts > 1 or not self._settings.own_forward:
            return None
        now = model.cost(shape, FULL, held).peak
        wanted = most_on_device(model, shape, FULL, int(LESS * now)).way.on_device
        if wanted is None or held == 0:
            return None
        on_device = wanted if held is None else min(held - 1, wanted)
        streamed = model.blocks - on_device
        return Way(with_streaming(self.way.recompute, streamed), on_device)

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
        now = choice_of(model, shape, self.way, None).cost.peak
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
        settings = self._settings.model_copy(update=free)
        return StepModel(self._model, settings, self._dtype, self._parts)

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
