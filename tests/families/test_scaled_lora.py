"""A LoRA on fp8 and int8 layers, with an alpha of its own: what PEFT's makes of plain Linears that
hold the dequantised weights, forward and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import ForwardOptions
from qwen_lora.families.qwen_image import scaled
from qwen_lora.families.qwen_image.scaled import KINDS, PRODUCTS, ScaledLinear
from qwen_lora.train.transformer import load_base
from tests.train.lora_model import CPU, LoraModel, lora_model, predict, shake

Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def run(made: LoraModel, transformer: torch.nn.Module) -> Result:
    """The prediction, and the gradients of its mean square by name."""
    prediction = predict(made.model, transformer)
    prediction.square().mean().backward()
    parameters = transformer.named_parameters()
    return prediction.detach(), {n: p.grad for n, p in parameters if p.grad is not None}


def plain_with_peft(made: LoraModel) -> torch.nn.Module:
    """The same weights in float32 Linears, with PEFT's own LoRA layers and diffusers' forward."""
    base = load_base(made.model, Settings(gradient_checkpointing=False), CPU)
    base.add_adapter(copy.deepcopy(made.transformer.peft_config["default"]))
    state = {n: p.detach() for n, p in made.transformer.named_parameters()}
    for name, layer in made.transformer.named_modules():
        if isinstance(layer, ScaledLinear):
            state[f"{name}.weight"] = layer.weight.float() * layer.scale[:, None]
    base.load_state_dict(state)
    return base


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# What products in 8 bits round away, over the whole model; without its scaling (1.75, with rsLoRA
# 3.5) the LoRA would be off by half.
ROUNDING = {"none": 0.0, "forward": 0.1, "both": 0.1}
CASES = [
    *(("no", kind, products, True) for kind in KINDS for products in PRODUCTS),
    *(("no", kind, "none", False) for kind in KINDS),
    *(("bf16", kind, "both", False) for kind in KINDS),
]


@pytest.mark.parametrize(("precision", "kind", "products", "use_rslora"), CASES)
def test_it_is_pefts_on_the_dequantised_weights(
    tiny_model: Path,
    precision: str,
    kind: str,
    products: str,
    use_rslora: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In our forward pass, and through PEFT's own on the layers in 8 bits."""
    monkeypatch.setattr(scaled, "FEW_ROWS", 0)  # this batch has few; a CPU takes any number
    made = lora_model(
        tiny_model,
        lora_alpha=7.0,
        use_rslora=use_rslora,
        lora_targets="all-linear+mod",
        mixed_precision=precision,
        base_precision=kind,
        low_precision_products=products,
        modulation_table=False,
    )
    shake(made)
    expected, gradients = run(made, plain_with_peft(made))
    assert len(gradients) == len(made.parameters)
    tolerance = ROUNDING[products] + (1e-5 if precision == "no" else 0.05)
    for own in (False, True):  # as it was loaded, then ours
        made.transformer.zero_grad()
        if own:
            made.model.family.prepare_training(made.transformer, ForwardOptions())
        prediction, found = run(made, made.transformer)
        assert found.keys() == gradients.keys()
        assert off(prediction, expected) < tolerance, own
        for part in (".lora_A.", ".lora_B."):
            names = [name for name in gradients if part in name]
            ours, theirs = (
                torch.cat([of[n].flatten() for n in names]) for of in (found, gradients)
            )
            assert off(ours, theirs) < tolerance, (own, part)
