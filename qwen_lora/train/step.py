# ruff: noqa: TID253
"""One optimizer step: the gradient of the sum of sample losses over the step's number of samples.

The micro-batches of a step are shared out over ranks and accumulated. A rank with nothing to do
repeats a micro-batch with weight zero, so that all ranks do the same. Nothing waits for the device:
an optimizer that can (torch's fused ones) is told there whether to update, and loss and gradient
norm are read later (results.py). With another optimizer, or in float16, each step reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.families.base import Family
from qwen_lora.train.data import LoadedBatch
from qwen_lora.train.flat import FlatLora
from qwen_lora.train.gradients import FlatGradients
from qwen_lora.train.objective import flow_matching_loss, token_loss
from qwen_lora.train.randomness import dropout_seed
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.results import Done, Part, Results, StepResult
from qwen_lora.train.short_memory import ShortMemory
from qwen_lora.train.undo import Undo

MAX_SKIPPED = 20  # fp16 updates skipped in a row before the run stops
_SHOWN_SAMPLES = 8


@dataclass(frozen=True)
class MicroStep:
    """One forward and backward of this rank."""

    batch: LoadedBatch
    index: int  # of the micro-batch in the step, over all ranks: seeds the LoRA's dropout
    weight: float  # 1, or 0 where the rank has no work of its own


@dataclass(frozen=True)
class _Passed:
    """What a forward and backward gave, on the device."""

    losses: torch.Tensor  # [B]
    loss_sum: torch.Tensor  # scalar, times the micro-step's weight


class SampleLosses(torch.nn.Module):
    """The loss of each sample as a module: what wraps it has forward and loss together, and the
    objective sees the transformer itself."""

    def __init__(self, transformer: torch.nn.Module, family: Family, weighting: str) -> None:
        super().__init__()
        self.transformer = transformer
        self.family = family
        self.weighting = weighting

    def forward(self, batch: LoadedBatch) -> torch.Tensor:
        """batch: on the transformer's device. Returns [B] float32."""
        if batch.tokens is not None:
            return token_loss(
                self.transformer,
                batch.tokens,
                batch.prompt_embeds,
                batch.prompt_masks,
                batch.sigmas,
                self.weighting,
                self.family,
            )
        return flow_matching_loss(
            self.transformer,
            batch.latents,
            batch.prompt_embeds,
            batch.prompt_masks,
            batch.noise,
            batch.sigmas,
            weighting_scheme=self.weighting,
            family=self.family,
        )


def seed_dropout(seed: int, device: torch.device) -> None:
    """Reseed the generator that dropout draws from on `device`.

    Not torch.manual_seed: it reseeds every device there is, and where CUDA is not in use it
    formats a stack trace each time (1.7 ms a step were measured).
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class Stepper:
    """Runs optimizer steps. `parameters` are the LoRA's, the only ones clipped and updated."""

    def __init__(
        self,
        ranks: Ranks,
        model: torch.nn.Module,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        scaler: torch.amp.GradScaler,
        settings: Settings,
        memory: ShortMemory | None = None,
        flat: FlatLora | None = None,
    ) -> None:
        """flat: what `optimizer` updates, made of `parameters`."""
        self.ranks, self.model, self.parameters = ranks, model, list(parameters)
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self._seed, self._max_norm = settings.seed, settings.max_grad_norm
        self._memory, self._undo = memory, Undo(optimizer, self.parameters, flat)
        self.flat = flat
        self._updated = self.parameters if flat is None else [flat.weight]
        self._gradients = flat.gradients if flat is not None else None
        if ranks.world > 1 and flat is None:
            self._gradients = FlatGradients(self.parameters)
        self._results = Results()
        # 1 as soon as a step was not finite: what GradScaler tells an optimizer, without its wait.
        self._bad: torch.Tensor | None = None
        self._one = torch.ones((), device=ranks.device)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaler.is_enabled():
            self._bad = torch.zeros((), device=ranks.device)
            told: Any = optimizer
            told.grad_scale, told.found_inf = None, self._bad

    def run(self, step: int, work: Sequence[MicroStep], step_samples: int) -> None:
        """Do step number `step` (from 0); `results` says what came of it. If its loss or gradient
        is not finite, neither it nor any later one changes a weight. With fp16 the scale is lowered
        and the step tried again, at most twenty times."""
        for _ in range(MAX_SKIPPED):
            values, losses = self._accumulate(step, work, step_samples)
            if self._bad is None:
                values = values.cpu()
                good = bool(values.isfinite().all())
            else:
                # GradScaler's own kernel: sets it to 1 for what is not finite; the rest times 1.
                torch._amp_foreach_non_finite_check_and_unscale_([values], self._bad, self._one)
                good = True  # the optimizer looks itself
            if good:
                self._update(step)
                self.scheduler.step()
            if good or not self.scaler.is_enabled():
                break
            self.scaler.update()  # unscale_ has seen the overflow: the scale goes down
        parts = [
            Part(micro.batch.sample_ids, micro.weight, found)
            for micro, found in zip(work, losses, strict=True)
        ]
        self._results.put(Done(step, parts), values)

    def results(self, wait: bool) -> list[StepResult]:
        """Of the steps since the last call, as far as they are known; wait: of all, at the same
        moment on every rank. Raises QwenLoraError on every rank for a step whose loss or gradient
        was not finite."""
        found = []
        while (known := self._results.look(wait)) is not None:
            done, result = known
            if not result.finite:
                if not wait and self._bad is not None and self.ranks.world > 1:
                    break  # not every rank knows by now, and the error is told together
                raise self._non_finite(done, result)
            found.append(result)
            self._results.drop()
        return found

    def _update(self, step: int) -> None:
        if self._memory is None:
            self.scaler.step(self.optimizer)
        else:
            # Gradients are those of all ranks by now: this one may repeat the update by itself.
            again, tried = self._memory.may_give_way() and self._undo.keep(), False

            def update() -> None:
                nonlocal tried
                if tried:
                    self._undo.back()
                tried = True
                self.scaler.step(self.optimizer)

            self._memory.optimizer(f"the optimizer in step {step + 1}", update, again)
        self.scaler.update()

    def _accumulate(
        self, step: int, work: Sequence[MicroStep], step_samples: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward and backward of all micro-batches; clipped gradients are left in place. Returns
        [2], the loss and gradient norm over all ranks, and this rank's sample losses."""
        passes: list[_Passed] = []
        while (failed := self._pass(step, work, step_samples, passes)) is not None:
            # Nothing of the step has left this rank. Gradients and dropout begin anew with it.
            assert self._memory is not None
            self._memory.give_way(step, failed.batch)
        loss_sum = passes[0].loss_sum
        for passed in passes[1:]:
            loss_sum = loss_sum + passed.loss_sum
        if self.ranks.world > 1:
            assert self._gradients is not None
            loss_sum = self._gradients.sum(loss_sum)
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        values = torch.stack([loss_sum / step_samples, grad_norm])
        return values, [passed.losses for passed in passes]

    def _pass(
        self, step: int, work: Sequence[MicroStep], step_samples: int, found: list[_Passed]
    ) -> MicroStep | None:
        """Put each micro-batch's losses into `found`, and gradients in place. Returns the
        one for which memory was too small, if the step may be done again with less."""
        device = self.ranks.device
        self._clear_gradients()
        found.clear()
        for micro in work:
            seed_dropout(dropout_seed(self._seed, step, micro.index), device)
            try:
                losses = self.model(micro.batch.to(device))  # [B] float32
                total = losses.sum()
                # Not accelerate's: it would divide by its own accumulation, which is always 1.
                self.scaler.scale(total * (micro.weight / step_samples)).backward()
            except torch.OutOfMemoryError as error:
                if self._memory is not None and self._memory.may_give_way():
                    return micro
                raise self._out_of_memory(step, micro.batch) from error
            except Exception as error:
                error.add_note(f"in step {step + 1}, samples {_names(micro.batch.sample_ids)}")
                raise
            weighted = total.detach() if micro.weight == 1 else total.detach() * micro.weight
            found.append(_Passed(losses.detach(), weighted))
        return None

    def _out_of_memory(self, step: int, batch: LoadedBatch) -> QwenLoraError:
        if self._memory is not None:
            return self._memory.error(step, batch)
        return QwenLoraError(f"step {step + 1}: the GPU's memory is too small for {batch.size}")

    def _clear_gradients(self) -> None:
        if self._gradients is not None:
            self._gradients.clear()
        else:
            for parameter in self.parameters:
                parameter.grad = None

    def _clip(self) -> torch.Tensor:
        """Always the norm of the parameters' norms: that of all numbers at once has other bits."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._updated, self._max_norm, norm)
        return norm

    def _non_finite(self, done: Done, result: StepResult) -> QwenLoraError:
        """The error, the same on every rank: the samples with a non-finite loss or, when only the
        gradient is not finite, all of the step's."""
        bad, every = [], []
        for part in done.parts:
            if part.weight:
                finite = torch.isfinite(part.losses).tolist()
                every += part.sample_ids
                bad += [name for name, ok in zip(part.sample_ids, finite, strict=True) if not ok]
        gathered = self.ranks.gather_json([bad, every])
        all_bad = sorted({name for part, _ in gathered for name in part})
        all_samples = sorted({name for _, part in gathered for name in part})
        shown = all_bad or all_samples
        tried = f" in {MAX_SKIPPED} attempts in a row" if self.scaler.is_enabled() else ""
        return QwenLoraError(
            f"step {done.step + 1}: the loss ({result.loss}) or the gradient norm "
            f"({result.grad_norm}) is not finite"
            f"{tried}; nothing was updated. Samples: {_names(shown)}. "
            "Lower learning_rate or check these images; earlier checkpoints are intact"
        )


def _names(sample_ids: Sequence[str]) -> str:
    names = ", ".join(sample_ids[:_SHOWN_SAMPLES])
    more = len(sample_ids) - _SHOWN_SAMPLES
    return f"{names} and {more} more" if more > 0 else names
