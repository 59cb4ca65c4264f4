# ruff: noqa: TID253
"""What a step does that has run out of GPU memory: say what would fit, or go on with less."""

from __future__ import annotations

import gc
import sys
from functools import cached_property
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.models import ModelFolder
from qwen_lora.train.cost.choice import AUTO, GIB, Choice, Way, choice_of, choose, what_fits
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.data import LoadedBatch
from qwen_lora.train.transformer import forward_options

LESS = 0.95  # of the predicted peak of what did not fit


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
    ) -> None:
        self.way = way
        self._settings, self._model, self._transformer = settings, model, transformer
        self._dtype, self._parts = dtype, parts

    def may_give_way(self) -> bool:
        return self._settings.oom_fallback and self._parts == 1

    def error(self, step: int, batch: LoadedBatch) -> QwenLoraError:
        """One line: what did not fit, and the settings that would."""
        shape = _shape(batch)
        model = StepModel(self._model, self._settings, self._dtype, self._parts)
        peak = model.cost(shape, self.way.recompute, self.way.on_device).peak
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
        gc.collect()  # the graph of the pass that failed
        if self._transformer_is_on_gpu():
            torch.cuda.empty_cache()
        choice = self._next(_shape(batch))
        if choice is None:
            raise self.error(step, batch)
        rounding = self._settings.compile_blocks is True
        print(
            f"step {step + 1}: out of GPU memory with {self.way}; going on with {choice.way} "
            f"(predicted peak {choice.cost.peak / GIB:.2f} GiB)"
            + "; compiled blocks round a little differently so"
            * rounding,
            file=sys.stderr,
        )
        self.way = choice.way
        options = forward_options(self._settings, self.way.recompute, self.way.on_device)
        self._model.family.prepare_training(self._transformer, options)

    def _next(self, shape: Shape) -> Choice | None:
        """The best way that takes less than the one that did not fit."""
        model = self._free_planner
        now = model.cost(shape, self.way.recompute, self.way.on_device).peak
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


def _shape(batch: LoadedBatch) -> Shape:
    height, width = batch.latents.shape[-2:]
    return Shape((height, width), tuple(len(embeds) for embeds in batch.prompt_embeds))
