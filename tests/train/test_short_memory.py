"""A step that runs out of GPU memory: one line that says what would fit, or the same step again
with less, to the bytes of a run that never ran out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_sets import MakeSettings

from qwen_lora.errors import QwenLoraError
from qwen_lora.train import short_memory
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.run import train
from tests.train.test_streamed_runs import deep_model

__all__ = ["deep_model"]

STEPS, MICRO_BATCHES = 3, 2


class Attention:
    """Runs out of memory at the calls whose numbers (from 1) are given, on the way in or, as
    "backward", when the gradient comes back through that call's result."""

    def __init__(self, at: dict[int, str]) -> None:
        self.at, self.calls, self.struck = dict(at), 0, 0
        self._plain = F.scaled_dot_product_attention

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        self.calls += 1
        where = self.at.get(self.calls)
        if where == "forward":
            self._strike()
        out = self._plain(*args, **options)
        if where == "backward" and out.requires_grad:
            out.register_hook(self._strike)
        return out

    def _strike(self, _: Any = None) -> None:
        self.struck += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def run(
    make_settings: MakeSettings, deep_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[bytes, Attention]]:
    def make(
        name: str, at: dict[int, str] | None = None, **changes: Any
    ) -> tuple[bytes, Attention]:
        short = {
            "pretrained_model_name_or_path": str(deep_model),
            "max_train_steps": STEPS,
            "checkpointing_steps": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "lora_dropout": 0.2,
        }
        attention = Attention(at or {})
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention)
            result = train(make_settings(name, **{**short, **changes}))
        return result.lora.read_bytes(), attention

    return make


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("forward", marks=pytest.mark.slow),
        pytest.param("twice", marks=pytest.mark.slow),
        "recomputing",
        pytest.param("streamed", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_done_again_to_the_same_bytes(
    run: Any, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    """In the forward pass, in the backward pass and in its recomputation, of the first and of the
    second micro-batch; nothing recomputed before, or everything; twice in one step."""
    expected, undisturbed = run("expected", oom_fallback=True)
    each = undisturbed.calls // STEPS // MICRO_BATCHES  # of a micro-batch
    capfd.readouterr()
    full = {"gradient_checkpointing": True, "recompute": "full"}
    at, changes = {
        "forward": ({2: "forward"}, {}),
        "twice": ({each + 3: "backward", 2 * each + 9: "forward"}, {}),
        "recomputing": ({each + 2: "forward"}, full),
        "streamed": ({3 * each + 3: "backward"}, {**full, "blocks_on_device": "1"}),
    }[case]
    found, attention = run("found", at, oom_fallback=True, **changes)
    assert attention.struck == len(at)
    assert found == expected
    err = capfd.readouterr().err
    assert err.count("out of GPU memory with") == len(at), err
    assert err.count("; going on with recompute ") == len(at)


def test_at_random_moments(run: Any, fault_seed: int) -> None:
    expected, undisturbed = run("expected")
    choose = random.Random(fault_seed)
    moments = choose.sample(range(1, undisturbed.calls), 2)
    at = {moment: choose.choice(["forward", "backward"]) for moment in moments}
    how = {"gradient_checkpointing": choose.random() < 0.5}
    found, _ = run("found", at, oom_fallback=True, **how)
    assert found == expected, at


def test_one_line_that_says_what_fits(run: Any, tmp_path: Path) -> None:
    with pytest.raises(QwenLoraError) as failed:
        run("stops", {20: "forward"})  # a step has 8 to 16: prompts of one length, or of two
    line = str(failed.value)
    assert "\n" not in line and line.startswith("step ")
    assert "the GPU's memory is too small for a micro-batch of " in line
    assert " px with " in line and " text tokens and recompute none (`plan` predicts" in line
    assert "would fit, it predicts: gradient_checkpointing: true with " in line
    assert line.endswith("Checkpoints are intact")
    assert CheckpointStore(tmp_path / "stops").steps()[0] == 1


def test_it_ends_when_nothing_is_left(
    run: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time with less, and every way once."""
    monkeypatch.setattr(short_memory, "LESS", 0.75)  # in fewer turns
    monkeypatch.setattr(short_memory, "what_fits", lambda *_: [])  # told in the test above
    every = dict.fromkeys(range(1, 1000), "forward")
    with pytest.raises(QwenLoraError, match="step 1: the GPU's memory is too small"):
        run("ends", every, oom_fallback=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "going on with" in line]
    ways = [line.split("going on with ")[1].split(" (")[0] for line in lines]
    assert len(set(ways)) == len(ways) >= 2
    assert ways[-1] == "recompute full and 0 blocks on the device"
