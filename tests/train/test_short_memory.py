"""A step, a validation or a preview that runs out of GPU memory: one line that says what would fit,
or the same again with less, to the bytes of a run that never ran out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_sets import MakeSettings, random_map, random_prompts, random_set

from qwen_lora.errors import QwenLoraError
from qwen_lora.train import short_memory
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train

STEPS, MICRO_BATCHES = 3, 2


class Attention:
    """Runs out of memory at the calls whose numbers (from 1) are given, on the way in or, as
    "backward", when the gradient comes back through that call's result. passes: only calls without
    gradients count."""

    def __init__(self, at: dict[int, str], passes: bool = False) -> None:
        self.at, self.calls, self.struck, self.passes = dict(at), 0, 0, passes
        self._plain = F.scaled_dot_product_attention

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        if self.passes and torch.is_grad_enabled():
            return self._plain(*args, **options)
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
        name: str, at: dict[int, str] | None = None, passes: bool = False, **changes: Any
    ) -> tuple[bytes, Attention]:
        short = {
            "pretrained_model_name_or_path": str(deep_model),
            "max_train_steps": STEPS,
            "checkpointing_steps": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "lora_dropout": 0.2,
        }
        attention = Attention(at or {}, passes)
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


# ---- passes without gradients ----------------------------------------------------------------


@pytest.fixture(scope="module")
def shown_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what previews need."""
    folder = tmp_path_factory.mktemp("shown") / "shards"
    return random_set(folder, 9, rgb=random_map(), prompts=random_prompts(["a fox", "two"]))


VALIDATION = {"validation_steps": 2, "validation_max_images": 2, "preview_steps": 0}
PREVIEWS = {"preview_steps": 2, "preview_inference_steps": 2}


def shown(run: Path) -> tuple[list[Any], dict[str, bytes]]:
    """What a run measured, and its pictures."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "fixed_train_loss" in row]
    return rows, {str(p.relative_to(run)): p.read_bytes() for p in run.glob("previews/*/*.png")}


@pytest.mark.parametrize("how", [VALIDATION, PREVIEWS], ids=["validation", "previews"])
def test_a_pass_without_gradients_is_done_again(
    run: Any, shown_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], how: Any
) -> None:
    """Before the first step and later: with fewer blocks on the device, the same numbers, pictures
    and LoRA. Nothing was recomputed; of streamed blocks training then recomputes every one."""
    how = {**how, "shards_dir": shown_shards, "oom_fallback": True}
    expected, undisturbed = run("expected", passes=True, **how)
    at = {3: "forward", undisturbed.calls // 2: "forward"}
    capfd.readouterr()
    found, attention = run("found", at, passes=True, **how)
    assert attention.struck == 2 and found == expected
    lines = [line for line in capfd.readouterr().err.splitlines() if "out of GPU memory" in line]
    what = "the fixed_train_loss of a sample" if "validation_steps" in how else "a preview of"
    assert all(what in line for line in lines) and len(lines) == 2, lines
    assert lines[0].endswith(
        "with recompute none; going on with recompute 3 blocks and 1 blocks on the device"
    )
    rows, pictures = shown(tmp_path / "found")
    assert (rows, pictures) == shown(tmp_path / "expected")
    assert (len(rows), len(pictures)) == ((3, 0) if "validation_steps" in how else (0, 6))


@pytest.mark.parametrize("how", [VALIDATION, PREVIEWS], ids=["validation", "previews"])
def test_a_pass_without_gradients_ends_in_one_line(run: Any, shown_shards: Path, how: Any) -> None:
    """Without `oom_fallback` at once, with it when no block is left on the device."""
    how = {**how, "shards_dir": shown_shards}
    avoids = "validation_steps: 0" if "validation_steps" in how else "preview_steps: 0"
    with pytest.raises(QwenLoraError) as failed:
        run("ends", {9: "forward"}, passes=True, **how)
    line = str(failed.value)
    assert "\n" not in line and line.startswith("the GPU's memory is too small for ")
    assert " px with recompute none (`plan` predicts 0.0" in line
    assert "; set blocks_on_device: 1; or base_precision: fp8; or " in line
    assert line.endswith(f"; or {avoids}. Checkpoints are intact")

    every = dict.fromkeys(range(9, 1000), "forward")
    with pytest.raises(QwenLoraError) as failed:
        run("falls-back", every, passes=True, oom_fallback=True, **how)
    assert "with recompute full and 0 blocks on the device" in str(failed.value)
    assert "set blocks_on_device" not in str(failed.value)
