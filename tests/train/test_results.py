"""Steps that nobody waits for: what a bad one leaves behind, and how often somebody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_sets import MakeSettings

from qwen_lora.errors import QwenLoraError
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import FILE, read_metrics
from qwen_lora.train.results import Results
from qwen_lora.train.run import train
from qwen_lora.train.step import SampleLosses, Stepper

LATE = 10  # steps


class ReadLate:
    """Numbers that arrive only when somebody waits for them, as a GPU's may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        look, take = Results.look, Stepper.results
        self.waits = 0

        def late(results: Results, wait: bool) -> Any:
            return look(results, wait) if wait else None

        def counted(stepper: Stepper, wait: bool) -> Any:
            self.waits += wait
            return take(stepper, wait)

        monkeypatch.setattr(Results, "look", late)
        monkeypatch.setattr(Stepper, "results", counted)


@pytest.mark.parametrize("optimizer", ["adamw", "torch.optim.SGD"])
def test_nothing_is_updated_by_and_after_a_step_that_is_not_finite(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Read ten steps late, or at once where the optimizer cannot be told: the same error, and
    weights and optimizer as they were before the step."""
    good = make_settings("good", max_train_steps=3, checkpointing_steps=3, optimizer=optimizer)
    train(good)
    if optimizer == "adamw":
        ReadLate(monkeypatch)
    settings = make_settings(
        max_train_steps=LATE, logging_steps=LATE, checkpointing_steps=LATE, optimizer=optimizer
    )
    original, calls = SampleLosses.forward, 0

    def forward(self: SampleLosses, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, batch) * (float("nan") if calls == 4 else 1.0)

    steppers: list[Stepper] = []
    run = Stepper.run

    def watched(self: Stepper, *args: Any) -> None:
        steppers.append(self)
        run(self, *args)

    monkeypatch.setattr(SampleLosses, "forward", forward)
    monkeypatch.setattr(Stepper, "run", watched)
    with pytest.raises(QwenLoraError, match=r"^step 4: the loss \(nan\) .*nothing was updated"):
        train(settings)
    assert calls == (LATE if optimizer == "adamw" else 4)
    saved = CheckpointStore(good.output_dir).load(3)
    weights = {tuple(tensor.shape): tensor for tensor in saved.lora.values()}
    assert len(weights) > 1
    saved_weights = sorted(float(tensor.double().sum()) for tensor in saved.lora.values())
    kept = sorted(float(tensor.detach().double().sum()) for tensor in steppers[-1].parameters)
    assert kept == saved_weights
    if optimizer == "adamw":
        stepper = steppers[-1]
        assert stepper.flat is not None
        states = stepper.flat.split(stepper.optimizer.state_dict())["state"].values()
        moments = sorted(float(state["exp_avg"].double().sum()) for state in states)
        theirs = sorted(
            float(tensor.double().sum())
            for name, tensor in saved.optimizer_tensors.items()
            if name.endswith("exp_avg")
        )
        assert moments == theirs
        assert {float(state["step"]) for state in states} == {3.0}


def test_the_device_is_waited_for_once_a_log_interval(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is late changes no byte of the LoRA, the metrics' losses and the checkpoints."""
    names = {"max_train_steps": 20, "logging_steps": 5, "checkpointing_steps": 10}
    at_once = train(make_settings("at_once", **names))
    late = ReadLate(monkeypatch)
    settings = make_settings("late", **names)
    done = train(settings)
    assert late.waits == 20 / 5
    assert done.lora.read_bytes() == at_once.lora.read_bytes()
    rows = [
        [
            (row["step"], row["loss"], row["smoothed_loss"], row["grad_norm"])
            for row in read_metrics(folder / FILE)
            if "loss" in row
        ]
        for folder in (settings.output_dir, settings.output_dir.parent / "at_once")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    states = [
        CheckpointStore(folder).load(10).state
        for folder in (settings.output_dir, settings.output_dir.parent / "at_once")
    ]
    assert states[0] == states[1]
