"""Linear layers in fp8 and int8: what they hold, their products and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.base import ForwardOptions
from qwen_lora.families.qwen_image import scaled
from qwen_lora.families.qwen_image.scaled import (
    CACHED_ROWS,
    KINDS,
    PRODUCTS,
    ScaledLinear,
    Stored,
    dequantize,
    quantize_rows,
)
from qwen_lora.models import ModelFolder
from qwen_lora.train.lora import LoraSpec, add_lora
from tests.train.lora_model import CPU, lora_model, shake

ROWS, INS, OUTS = 34, 64, 96


def made(kind: str, products: str, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """A layer, its full weight, an input that wants a gradient, and a gradient of the output."""
    random = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(INS, OUTS, dtype=dtype).requires_grad_(False)
    weight = torch.randn(OUTS, INS, generator=random).to(dtype)
    linear.bias.copy_(torch.randn(OUTS, generator=random))
    layer = ScaledLinear(linear, kind, products)
    layer.put(weight, CPU)
    x = torch.randn(2, ROWS // 2, INS, generator=random).to(dtype).requires_grad_()
    return layer, weight, x, torch.randn(2, ROWS // 2, OUTS, generator=random).to(dtype)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kind", "worst"), [("fp8", 1 / 16), ("int8", 1 / 127)])
def test_each_row_is_held_to_its_own_scale(kind: str, worst: float) -> None:
    """Rows of very different sizes, one of zeros: fp8 to half a step of its three bits, int8 to
    half a step of its row's largest number."""
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    values, scale = quantize_rows(weight, KINDS[kind])
    assert values.dtype == KINDS[kind] and scale.shape == (5,) and scale.dtype == torch.float32
    largest = weight.abs().amax(dim=1)
    assert torch.allclose(values.float().abs().amax(dim=1) * scale, largest)
    error = (values.float() * scale[:, None] - weight).abs()
    if kind == "fp8":
        assert bool((error <= worst * weight.abs() + 2**-10 * scale[:, None]).all())
    else:
        assert bool((error <= 0.5001 * worst * largest[:, None]).all())
    assert not bool(error[3].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_weight_cast_up(kind: str, dtype: torch.dtype) -> None:
    """To the bit, in both directions."""
    layer, weight, x, gradient = made(kind, "none", dtype)
    out = layer(x)
    out.backward(gradient)
    dense = (layer.weight.float() * layer.scale[:, None]).to(dtype)
    assert torch.equal(out, F.linear(x, dense, layer.bias))
    other = x.detach().clone().requires_grad_()
    F.linear(other, dense, layer.bias).backward(gradient)
    assert torch.equal(x.grad, other.grad)
    assert 1e-3 < off(dense, weight) < (0.03 if kind == "fp8" else 0.007)


@pytest.mark.parametrize("products", ["forward", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_in_8_bits(kind: str, products: str) -> None:
    """Against the same arithmetic in float32: each row of the activations has a scale, sums are
    exact (int8) or rounded to bfloat16 at the end (fp8)."""
    layer, weight, x, gradient = made(kind, products, torch.float32)
    out = layer(x)
    out.backward(gradient)
    values, rows = quantize_rows(x.detach().flatten(0, 1), KINDS[kind])
    expected = (values.float() @ layer.weight.float().t()) * rows[:, None] * layer.scale
    expected = (expected + layer.bias).view_as(out)
    rounding = 1e-6 if kind == "int8" else 2**-8
    assert off(out, expected) < rounding
    assert 1e-3 < off(out, F.linear(x, weight, layer.bias)) < 0.06
    dense = layer.weight.float() * layer.scale[:, None]
    if products == "forward":
        assert torch.equal(x.grad, gradient @ dense)
        return
    flat = gradient.flatten(0, 1)
    values, rows = quantize_rows(flat, KINDS[kind])
    back = (values.float() @ layer.weight_t.float().t()) * rows[:, None] * layer.scale_t
    assert off(layer.weight_t.float() * layer.scale_t[:, None], weight.t()) < 0.03
    assert off(x.grad, back.view_as(x)) < rounding
    assert 1e-3 < off(x.grad, gradient @ weight) < 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_small_and_odd_shapes_are_cast_up(kind: str) -> None:
    """What the hardware's products do not take: few rows, sizes that are no multiple of 16."""
    layer, _, x, _ = made(kind, "both", torch.float32)
    dense = dequantize(layer.weight, layer.scale, torch.float32)
    few = x.detach()[:1, : scaled.FEW_ROWS]
    assert torch.equal(layer(few), F.linear(few, dense, layer.bias))
    for ins, outs in ((24, 32), (32, 24)):
        odd = ScaledLinear(torch.nn.Linear(ins, outs), kind, "both")
        assert odd.products == "none" and odd.weight_t is None


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_input_is_kept(kind: str, products: str) -> None:
    layer, _, x, _ = made(kind, products, torch.bfloat16)
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert saved and set(saved) <= own


def test_a_weight_in_the_layers_type_is_kept_as_it_is() -> None:
    random = torch.Generator().manual_seed(4)
    values = torch.randn(OUTS, INS, generator=random).to(torch.float8_e4m3fn)
    stored = Stored(values, torch.full((OUTS,), 0.3))
    layer = ScaledLinear(torch.nn.Linear(INS, OUTS), "fp8")
    layer.put(stored, CPU)
    assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(layer.scale, stored.scale)
    other = ScaledLinear(torch.nn.Linear(INS, OUTS), "int8")
    other.put(stored, CPU)
    assert off(dequantize(other.weight, other.scale, torch.float32), stored.dense()) < 0.01


# ---- in the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_are_held_in_8_bits(model: ModelFolder, kind: str) -> None:
    """Those of the blocks, but for the image MLP's output and the modulation."""
    loaded = model.family.load_transformer(
        model, device=CPU, dtype=torch.bfloat16, base_precision=kind
    )
    low = {n for n, m in loaded.named_modules() if isinstance(m, ScaledLinear)}
    linears = {n for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = {name.partition("transformer_blocks.0.")[2] for name in linears - low} - {""}
    assert kept == {"img_mlp.net.2", "img_mod.1", "txt_mod.1"}
    assert len(low) == 2 * 11 and all("transformer_blocks" in name for name in low)
    for name in linears:
        layer = loaded.get_submodule(name)
        assert layer.weight.dtype == (KINDS[kind] if name in low else torch.bfloat16), name
        assert not layer.weight.requires_grad


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_own_forward_is_diffusers_with_peft(
    tiny_model: Any, kind: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared LoRA product and the base's: losses and all gradients together, in float32. With
    products in 8 bits both quantise the same rows."""
    monkeypatch.setattr(scaled, "FEW_ROWS", 0)  # this batch has few; a CPU takes any number
    changes = {"base_precision": kind, "low_precision_products": products}
    results = []
    for own in (False, True):
        built = lora_model(tiny_model, lora_targets="all-linear+mod", **changes)
        shake(built)
        built.model.family.prepare_training(built.transformer, ForwardOptions(own=own))
        loss = built.predict().square().mean()
        loss.backward()
        gradients = [p.grad.flatten() for _, p in built.parameters if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    (plain, expected), (own_loss, found) = results
    # A number at the edge between two of 8 bits may go the other way.
    tolerance = 1e-5 if products == "none" else 0.02
    assert own_loss == pytest.approx(plain, rel=tolerance)
    assert off(found, expected) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_without_such_products_is_refused(
    model: ModelFolder, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old")
    with pytest.raises(InputError, match=r"capability 8\.\d, Old has 7\.5; set low_precision"):
        scaled.check_products(kind, torch.device("cuda"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel\nfound")

    monkeypatch.setattr(torch, "_scaled_mm" if kind == "fp8" else "_int_mm", fail)
    with pytest.raises(InputError, match="does not run on this cpu: no kernel; set"):
        model.family.load_transformer(
            model,
            device=CPU,
            dtype=torch.float32,
            base_precision=kind,
            low_precision_products="forward",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_taken_in_by_parts_has_the_bits_of_a_whole_one(kind: str) -> None:
    weight = torch.randn(3 * CACHED_ROWS + 16, 32).bfloat16()
    layer = ScaledLinear(torch.nn.Linear(*reversed(weight.shape), device="meta"), kind, "both")
    layer.put(weight, CPU)
    for held, dense in ((layer.weight, weight), (layer.weight_t, weight.t())):
        expected, scale = quantize_rows(dense.contiguous(), KINDS[kind])
        assert held is not None and torch.equal(held.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(layer.scale if held is layer.weight else layer.scale_t, scale)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind: str, products: str) -> None:
    """No break; any number of rows beyond the first two is a symbol."""
    layer, _, x, gradient = made(kind, products, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (ROWS // 2, 12, 11):
        mine, theirs = (x.detach()[:, :rows].clone().requires_grad_() for _ in range(2))
        compiled(mine).backward(gradient[:, :rows])
        layer(theirs).backward(gradient[:, :rows])
        assert mine.grad is not None and theirs.grad is not None
        assert off(mine.grad, theirs.grad) < 0.02
        assert off(compiled(mine), layer(theirs)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_quantise_it_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v: the same numbers as one by one, also where one of them is another layer."""
    from qwen_lora.families.qwen_image.adapted import project

    made_layers = [made(kind, "forward", torch.bfloat16) for _ in range(3)]
    layers, x = [layer for layer, *_ in made_layers], made_layers[0][2]
    calls: list[int] = []

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return quantize_rows(*arguments)

    monkeypatch.setattr(scaled, "quantize_rows", count)
    together = project(layers, x)
    assert len(calls) == 1
    assert all(torch.equal(out, layer(x)) for out, layer in zip(together, layers, strict=True))
    calls.clear()
    project([*layers, torch.nn.Linear(INS, 8, dtype=torch.bfloat16)], x)
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_block_keeps_no_weight_cast_up(
    model: ModelFolder, kind: str, products: str
) -> None:
    """Of the forward pass for the backward pass, when nothing has to be recomputed: no more than a
    block in bf16 does."""
    from qwen_lora.families.qwen_image.compiled import kept_bytes

    kept = []
    for how in ({}, {"base_precision": kind, "low_precision_products": products}):
        empty = model.family.empty_transformer(model, blocks=3, dtype=torch.bfloat16, **how)
        add_lora(empty, LoraSpec.from_settings(Settings(rank=4)), model.family, 0)
        kept.append(kept_bytes(empty, 24, [20], budget=1.0))
    assert kept[1] <= kept[0]
