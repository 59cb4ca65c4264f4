# ruff: noqa: TID253
"""The training loop: steps, and once in a while a line of metrics, a measurement, a checkpoint,
previews and the report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import Stopped
from qwen_lora.posix import peak_rss_gib
from qwen_lora.progress import Progress
from qwen_lora.train.checkpoint import TrainState
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.metrics import MetricsFile
from qwen_lora.train.previews import Previews
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.report import Report
from qwen_lora.train.results import StepResult
from qwen_lora.train.signals import StopRequest
from qwen_lora.train.step import MicroStep, Stepper
from qwen_lora.train.trackers import Trackers
from qwen_lora.train.validation import Measure

SMOOTHING = 0.95  # of the shown loss, per step


@dataclass(frozen=True)
class Work:
    """One step's share of this rank."""

    epoch: int
    index: int  # of the step in its epoch
    micro_steps: list[MicroStep]
    samples: int  # of the step, over all ranks
    last_of_epoch: bool


@dataclass
class LoopParts:
    """What the loop works with; `save` publishes a checkpoint of a state on all ranks together.
    `report` is on rank 0 alone and is written after that."""

    settings: Settings
    ranks: Ranks
    stepper: Stepper
    loader: BatchLoader
    measure: Measure | None
    metrics: MetricsFile
    trackers: Trackers
    save: Callable[[TrainState], None]
    previews: Previews | None = None
    report: Report | None = None


def upcoming(parts: LoopParts, state: TrainState) -> Generator[Work]:
    """This rank's work from the cursor on, over epochs without end."""
    ranks, plan = parts.ranks, parts.loader.plan(state.epoch)
    stream = parts.loader.stream_epochs(state.epoch, state.epoch_step, ranks.rank, ranks.world)
    for epoch, index, batches in stream:
        if plan.epoch != epoch:
            plan = parts.loader.plan(epoch)
        micro_steps = []
        for position, batch in enumerate(batches):
            number = position * ranks.world + ranks.rank
            if batch is None:  # nothing left for this rank: the first one again, weight 0
                batch = parts.loader.load(plan.step(index)[0], epoch)
                micro_steps.append(MicroStep(batch, number, weight=0.0))
            else:
                micro_steps.append(MicroStep(batch, number, weight=1.0))
        yield Work(epoch, index, micro_steps, plan.samples(index), index + 1 == plan.steps)


class Loop:
    """Runs from `state` to `max_train_steps`."""

    def __init__(self, parts: LoopParts, state: TrainState) -> None:
        self.parts, self.settings, self.ranks = parts, parts.settings, parts.ranks
        self.state = state
        self._saved_step = state.step
        self._last: StepResult | None = None
        self._timed_steps, self._timed_samples, self._timed_s, self._waited_s = 0, 0, 0.0, 0.0

    def run(self) -> TrainState:
        """Raises Stopped after saving when a stop signal came on any rank."""
        settings = self.settings
        quiet = not self.ranks.is_main
        last = settings.max_train_steps
        bar = Progress("train", last, "step", initial=self.state.step, quiet=quiet)
        work = upcoming(self.parts, self.state)
        with StopRequest() as stop, bar, closing(work), self.ranks.lifeline.telling():
            self._measure(stop)
            self._preview(stop, bar)
            while self.state.step < last:
                started = time.monotonic()
                current = self._agree_on_next(work, stop)
                lr = float(self.parts.stepper.optimizer.param_groups[0]["lr"])
                self.parts.stepper.run(self.state.step, current.micro_steps, current.samples)
                self._advance(current)
                self._take_results(wait=self._ends_interval())
                self._time(current.samples, time.monotonic() - started)
                bar.note(self._note())
                bar.update()
                self._log(lr)
                self._measure(stop)
                saved = self._save_when_due()
                self._preview(stop, bar)  # after saving: drawing may take minutes
                if saved and self.state.step < last:
                    self._report("running")
        return self.state

    def _agree_on_next(self, work: Generator[Work], stop: StopRequest) -> Work:
        """The next step's work, unless a rank was asked to stop or could not read its records."""
        current, failure = None, None
        started = time.monotonic()
        try:
            current = next(work)
        except Exception as error:
            failure = error
        self._waited_s += time.monotonic() - started
        signum = self.ranks.agree(failure, stop.signum)
        if signum:
            self._take_results(wait=True)
            if self._saved_step != self.state.step or self.state.step == 0:
                self.parts.save(self.state)
            self.ranks.on_main(lambda: self._report("stopped"))  # nobody leaves before it is there
            raise Stopped(
                signum,
                f"stopped at step {self.state.step}, saved; run the same command to continue",
            )
        assert current is not None
        return current

    def _advance(self, work: Work) -> None:
        state = self.state
        self.state = replace(
            state,
            step=state.step + 1,
            epoch=work.epoch + 1 if work.last_of_epoch else work.epoch,
            epoch_step=0 if work.last_of_epoch else work.index + 1,
            samples=state.samples + work.samples,
        )

    def _ends_interval(self) -> bool:
        """Whether something happens after this step that needs the numbers of all so far."""
        step, settings, previews = self.state.step, self.settings, self.parts.previews
        every = (settings.logging_steps, settings.checkpointing_steps, settings.validation_steps)
        return (
            any(count > 0 and step % count == 0 for count in every)
            or step == settings.max_train_steps
            or (previews is not None and previews.plan.due(step, settings.max_train_steps))
        )

    def _take_results(self, wait: bool) -> None:
        """Into the state; it may lag behind the steps until somebody waits."""
        for result in self.parts.stepper.results(wait):
            before = self.state.smoothed_loss
            smoothed = (
                result.loss
                if before is None
                else SMOOTHING * before + (1 - SMOOTHING) * result.loss
            )
            self.state = replace(
                self.state,
                smoothed_loss=smoothed,
                interval_losses=(*self.state.interval_losses, result.loss),
            )
            self._last = result

    def _time(self, samples: int, seconds: float) -> None:
        self._timed_steps += 1
        self._timed_samples += samples
        self._timed_s += seconds

    def _note(self) -> str:
        smoothed = self.state.smoothed_loss
        loss = "" if smoothed is None else f"loss {smoothed:.4f}, "
        return (
            f"{loss}{self._timed_s / self._timed_steps:.2f} s/step, "
            f"{self._timed_samples / self._timed_s:.2f} samples/s"
        )

    def _log(self, lr: float) -> None:
        """One line each `logging_steps` and at the end, with the mean loss since the last one."""
        state = self.state
        if state.step % self.settings.logging_steps and state.step != self.settings.max_train_steps:
            return
        assert self._last is not None
        row: dict[str, Any] = {
            "step": state.step,
            "epoch": state.epoch,
            "loss": sum(state.interval_losses) / len(state.interval_losses),
            "smoothed_loss": state.smoothed_loss,
            "learning_rate": lr,
            "grad_norm": self._last.grad_norm,
            "step_seconds": round(self._timed_s / self._timed_steps, 6),
            "samples_per_s": round(self._timed_samples / self._timed_s, 4),
            "data_wait_seconds": round(self._waited_s / self._timed_steps, 6),
            "samples": state.samples,
        }
        if self.parts.stepper.scaler.is_enabled():
            row["loss_scale"] = self.parts.stepper.scaler.get_scale()
        if self.ranks.device.type == "cuda":  # a counter on the host, no wait for the device
            peak = torch.cuda.max_memory_allocated(self.ranks.device)
            row["peak_memory_gib"] = round(peak / 2**30, 3)
        if (rss := peak_rss_gib()) is not None:
            row["peak_rss_gib"] = round(rss, 3)
        self._write(row)
        self.state = replace(state, interval_losses=())
        self._timed_steps, self._timed_samples, self._timed_s, self._waited_s = 0, 0, 0.0, 0.0

    def _measure(self, stop: StopRequest) -> None:
        """At step 0, each `validation_steps` and at the end; not twice at one step."""
        step, every = self.state.step, self.settings.validation_steps
        due = every > 0 and (step % every == 0 or step == self.settings.max_train_steps)
        measure = self.parts.measure
        if not due or measure is None:
            return
        metrics = self.parts.metrics
        if self.ranks.on_main(lambda: metrics.last_step_of(measure.name)) >= step:
            return
        values = measure.run(lambda: stop.signum)
        if values is not None:
            self._write({"step": step, "epoch": self.state.epoch, **_json_numbers(values)})
            if self.ranks.is_main and not all(map(math.isfinite, values.values())):
                print(
                    f"warning: {measure.name} is not finite at step {step} (null in the metrics)",
                    file=sys.stderr,
                )

    def _preview(self, stop: StopRequest, bar: Progress) -> None:
        """At step 0, each so many steps and at the end; not twice at one step."""
        previews, step = self.parts.previews, self.state.step
        if previews is None or not previews.plan.due(step, self.settings.max_train_steps):
            return
        if self.ranks.on_main(lambda: step in previews.files.steps()):
            return
        if not stop.signum:
            bar.say(f"drawing {len(previews.plan.prompts)} previews at step {step}")
        started = time.monotonic()
        pictures = previews.run(step, lambda: stop.signum)
        bar.leave_out(time.monotonic() - started)
        if pictures:
            self.parts.trackers.log_images(pictures, step)

    def _report(self, status: str) -> None:
        if self.parts.report is not None:
            self.parts.report.write(self.state, status)

    def _write(self, row: dict[str, Any]) -> None:
        self.ranks.on_main(lambda: self.parts.metrics.write(row))  # a full disk ends every rank
        self.parts.trackers.log(row, step=row["step"])

    def _save_when_due(self) -> bool:
        step = self.state.step
        due = step % self.settings.checkpointing_steps == 0 or step == self.settings.max_train_steps
        if due:
            self.parts.save(self.state)
            self._saved_step = step
        return due


def _json_numbers(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: None stands for it."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
