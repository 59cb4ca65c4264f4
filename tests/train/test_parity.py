"""`qwen-lora plan --check`: loss and gradients of a base of low precision beside the full one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_sets import MakeSettings
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image import scaled
from qwen_lora.train import parity
from qwen_lora.train.parity import check_precision, format_check

# Kind, products, relative difference of the loss, and of the gradients in parts of their norm
# (float32, bfloat16): what was measured here, with about a half on top.
BOUNDS = [
    ("fp8", "none", 1e-3, (0.065, 0.067)),  # 0.043, 0.045
    ("fp8", "forward", 4e-3, (0.095, 0.095)),  # 0.063, 0.062
    ("fp8", "both", 4e-3, (0.097, 0.097)),  # 0.065, 0.065
    ("int8", "none", 1e-3, (0.009, 0.019)),  # 0.006, 0.013
    ("int8", "forward", 1e-3, (0.018, 0.024)),  # 0.012, 0.016
    ("int8", "both", 1e-3, (0.020, 0.026)),  # 0.013, 0.017
    ("nf4", "none", 4e-3, (0.25, 0.26)),  # 0.164, 0.172
]


@pytest.fixture
def settings(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> MakeSettings:
    # The tiny model's samples have few tokens; a CPU's products take any number.
    monkeypatch.setattr(scaled, "FEW_ROWS", 0)

    def make(**changes: Any) -> Any:
        return make_settings(lora_targets="all-linear", **changes)

    return make


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize(("kind", "products", "worst", "gradients"), BOUNDS)
def test_figures_of_the_tiny_model(
    kind: str,
    products: str,
    worst: float,
    gradients: tuple[float, float],
    mixed_precision: str,
    settings: MakeSettings,
) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    facts = check_precision(
        settings(
            base_precision=kind, low_precision_products=products, mixed_precision=mixed_precision
        )
    )
    print(kind, products, mixed_precision, facts)
    most = gradients[mixed_precision == "bf16"]
    assert 0 < abs(facts["loss_difference"]) < worst
    assert most / 3 < facts["gradient_difference"] < most
    assert 1 - most**2 < facts["gradient_cosine"] < 1
    assert abs(facts["gradient_norm_ratio"] - 1) < most


def test_a_base_that_8_bits_hold_exactly(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No difference then: batch, noise, LoRA and types are the same on both sides."""
    load = parity.load_base

    def simple(*arguments: Any, **others: Any) -> torch.nn.Module:
        transformer = load(*arguments, **others)
        for module in transformer.get_submodule("transformer_blocks").modules():
            if isinstance(module, scaled.ScaledLinear):
                module.weight.data.fill_(1.0)
                module.scale.fill_(2**-7)
            elif type(module) is torch.nn.Linear:
                module.weight.data.fill_(2**-7)
        return transformer

    monkeypatch.setattr(parity, "load_base", simple)
    facts = check_precision(settings(base_precision="fp8"))
    before, after = facts["losses"]
    assert after == pytest.approx(before, rel=1e-6)
    assert facts["gradient_difference"] < 1e-5


def test_what_does_not_fit_is_streamed(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = check_precision(settings(base_precision="fp8"))
    monkeypatch.setattr(parity, "_fits", lambda *_: False)
    streamed = check_precision(settings(base_precision="fp8"))
    assert (resident["streamed"], streamed["streamed"]) == ([False] * 2, [True] * 2)
    assert streamed["losses"] == resident["losses"]
    assert streamed["gradient_difference"] == resident["gradient_difference"]
    assert "copied from host memory" in format_check(streamed)


def test_the_command(train_shards: Path, transformer_only: Path) -> None:
    common = ["plan", str(train_shards), "--model", str(transformer_only), "--tflops", "1"]
    chosen = ["--set", "base_precision=int8", "--set", "rank=4", "--check"]
    result = CliRunner().invoke(app, [*common, *chosen])
    assert result.exit_code == 0, result.output
    assert "int8 beside float32 on cpu: the first batch, 1 sample(s)" in result.stdout
    assert "LoRA gradients: cosine 0.999" in result.stdout
    result = CliRunner().invoke(app, [*common, "--check"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "--set base_precision=fp8" in result.stderr


def test_facts_are_json(settings: MakeSettings) -> None:
    facts = check_precision(settings(base_precision="int8"))
    assert json.loads(json.dumps(facts)) == facts


def test_nothing_to_compare(settings: MakeSettings) -> None:
    with pytest.raises(InputError, match="compares a base of low precision"):
        check_precision(settings())
