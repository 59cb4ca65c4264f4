"""Every way the transformer can run ends with the same loss curve as the plain one: diffusers' own
forward in float32, each block recomputed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from random_sets import MakeSettings

from qwen_lora.families import offload
from qwen_lora.families.offload import ActivationOffload
from qwen_lora.families.qwen_image import forward, scaled
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import TrainResult, train

STEPS = 100


@pytest.fixture
def run(make_settings: MakeSettings) -> Any:
    def make(name: str, **changes: Any) -> TrainResult:
        short = {
            "max_train_steps": STEPS,
            "logging_steps": 1,
            "checkpointing_steps": STEPS,
            "learning_rate": 5e-3,
        }
        return train(make_settings(name, **{**short, **changes}))

    return make


def curve(result: TrainResult) -> np.ndarray[Any, Any]:
    """[STEPS]"""
    rows = read_metrics(result.lora.parent / "metrics.jsonl")
    return np.array([row["loss"] for row in rows if "loss" in row])


def test_own_forward_learns_what_diffusers_does(run: Any) -> None:
    """float32, 100 steps: every loss to 1e-5; recomputing changes no bit of the LoRA."""
    plain = run("plain", own_forward=False, gradient_checkpointing=True)
    own = run("own")
    assert len(curve(own)) == STEPS
    np.testing.assert_allclose(curve(own), curve(plain), rtol=1e-5)
    assert own.lora.read_bytes() != plain.lora.read_bytes(), "they round differently"
    for recompute in ("full", "selective", "1"):
        again = run(f"own-{recompute}", gradient_checkpointing=True, recompute=recompute)
        assert again.lora.read_bytes() == own.lora.read_bytes(), recompute


def test_bf16_with_the_table_learns_the_same(run: Any) -> None:
    """bfloat16, 100 steps: the mean loss to 1 %, each loss to 5 %, of float32's and of one
    another's."""
    plain = run("plain", mixed_precision="bf16", own_forward=False)
    live = run("live", mixed_precision="bf16", modulation_table=False)
    tabled = run("tabled", mixed_precision="bf16")
    for result in (live, tabled):
        np.testing.assert_allclose(curve(result), curve(plain), rtol=0.05)
        assert curve(result).mean() == pytest.approx(curve(plain).mean(), rel=0.01)
    again = run("again", mixed_precision="bf16", gradient_checkpointing=True, recompute="selective")
    assert again.lora.read_bytes() == tabled.lora.read_bytes()


@pytest.mark.parametrize(
    ("precision", "products", "worst"),
    [
        ("fp8", "both", 0.005),
        pytest.param("fp8", "none", 0.005, marks=pytest.mark.slow),
        pytest.param("int8", "both", 0.001, marks=pytest.mark.slow),
    ],
)
def test_a_base_of_8_bits_learns_the_same(
    run: Any, precision: str, products: str, worst: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps: the mean loss to so much of float32's; recomputing changes no bit of the LoRA."""
    monkeypatch.setattr(scaled, "FEW_ROWS", 0)  # these samples have few tokens
    plain = run("plain")
    how = {"base_precision": precision, "low_precision_products": products}
    low = run("low", **how)
    print(precision, products, curve(low).mean() / curve(plain).mean() - 1)
    assert curve(low).mean() == pytest.approx(curve(plain).mean(), rel=worst)
    assert curve(low)[-10:].mean() < 0.9 * curve(low)[:10].mean()
    for recompute in ("full", "selective"):
        again = run(f"low-{recompute}", gradient_checkpointing=True, recompute=recompute, **how)
        assert again.lora.read_bytes() == low.lora.read_bytes(), recompute


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize(
    ("precision", "products"), [("fp8", "none"), ("fp8", "both"), ("int8", "both")]
)
def test_a_compiled_base_of_8_bits(
    run: Any, precision: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean loss to 1 %: a number at the edge between two of 8 bits may go the other way."""
    monkeypatch.setattr(scaled, "FEW_ROWS", 0)
    how = {"base_precision": precision, "low_precision_products": products}
    eager, compiled = run("eager", **how), run("compiled", compile_blocks=True, **how)
    print(curve(compiled).mean() / curve(eager).mean() - 1)
    assert curve(compiled).mean() == pytest.approx(curve(eager).mean(), rel=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "1", "full"])
def test_compiled_learns_the_same(run: Any, precision: str, recompute: str) -> None:
    """Every loss to 1e-4 in float32, to 5 % in bfloat16."""
    how = {
        "mixed_precision": precision,
        "gradient_checkpointing": recompute != "none",
        "recompute": "full" if recompute == "none" else recompute,
    }
    eager, compiled = run("eager", **how), run("compiled", compile_blocks=True, **how)
    np.testing.assert_allclose(
        curve(compiled), curve(eager), rtol=1e-4 if precision == "no" else 0.05
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
def test_a_compiled_run_makes_two_graphs(run: Any, deep_model: Path) -> None:
    """One for the last block, one for all others, and none for measuring a loss."""
    how = {
        "pretrained_model_name_or_path": str(deep_model),
        "train_batch_size": 1,
        "max_train_steps": 4,
        "validation_steps": 2,
    }
    measured = []
    for name, compiled in (("eager", False), ("compiled", True)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        rows = read_metrics(run(name, compile_blocks=compiled, **how).lora.parent / "metrics.jsonl")
        measured.append([row["fixed_train_loss"] for row in rows if "fixed_train_loss" in row])
    assert len(measured[0]) == 3
    np.testing.assert_allclose(measured[1], measured[0], rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize("recompute", ["2", "full"])
def test_a_compiled_run_from_host_memory(
    run: Any, deep_model: Path, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four blocks' weights, and what blocks keep but for the last ones: the same LoRA."""
    monkeypatch.setattr(offload, "LARGE", 1024)  # the tiny model's tensors are small
    monkeypatch.setattr(offload, "COMPILED", 1)  # of four blocks three would stay
    monkeypatch.setattr(forward, "COMPILED", 1)
    how = {
        "pretrained_model_name_or_path": str(deep_model),
        "train_batch_size": 1,
        "max_train_steps": 12,
        "mixed_precision": "bf16",
        "compile_blocks": True,
        "gradient_checkpointing": True,
        "recompute": recompute,
    }
    left: list[int] = []
    send = ActivationOffload._send

    def watched(self: ActivationOffload, block: Any, there: Any) -> None:
        left.append(block.index)
        send(self, block, there)

    monkeypatch.setattr(ActivationOffload, "_send", watched)
    expected = run("there", **how)
    assert not left
    found = run("host", blocks_on_device="1", offload_activations=True, **how)
    assert set(left) == {0, 1, 2}
    assert found.lora.read_bytes() == expected.lora.read_bytes()
