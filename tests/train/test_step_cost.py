"""What a step costs by shapes alone, against real passes on a CPU and closed formulas."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.models import resolve_model
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.trace import trace
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss
from qwen_lora.train.transformer import load_base

GIB = 1 << 30
REAL = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
WAYS = ("none", "selective", "1", "full")
SHAPES = (Shape((32, 16), (20,)), Shape((16, 24), (9, 7, 7)), Shape((8, 8), (40, 40)))
TYPES = {torch.float32: "no", torch.bfloat16: "bf16"}


def step_model(
    folder: Path, dtype: torch.dtype, config: dict[str, Any], **changes: Any
) -> StepModel:
    """Of a model that is nothing but a config."""
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    named = {"_class_name": "QwenImageTransformer2DModel", **config}
    (folder / "transformer" / "config.json").write_text(json.dumps(named))
    model = resolve_model(str(folder), ("transformer",), weights=False)
    return StepModel(model, Settings(**changes), dtype)


def like(model: StepModel, **changes: Any) -> StepModel:
    """The same with other ways to run it, and all that is known of it already. Not for settings
    that change what a block computes or holds."""
    other = copy.copy(model)
    other.settings = Settings(**changes)
    return other


def small(**changes: Any) -> dict[str, Any]:
    shape = {"attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "num_attention_heads": 3}
    return {**REAL, **shape, "joint_attention_dim": 40, "num_layers": 3, **changes}


class RealStep:
    """The same model with numbers, on the CPU, and one batch for it."""

    def __init__(
        self, model: StepModel, shape: Shape, recompute: str, quantised: bool = False
    ) -> None:
        from diffusers import QwenImageTransformer2DModel

        config = model.model.config("transformer")
        if quantised:
            self.transformer: Any = load_base(model.model, model.settings, torch.device("cpu"))
        else:
            made = QwenImageTransformer2DModel(**{k: v for k, v in config.items() if k[0] != "_"})
            self.transformer = torch.nn.Module.to(made, model.dtype).requires_grad_(False)
        spec = LoraSpec.from_settings(model.settings)
        for _, parameter in add_lora(self.transformer, spec, model.family, 0):
            parameter.grad = torch.zeros_like(parameter)
        self.transformer.train()
        options = ForwardOptions(recompute=Recompute.parse(recompute))
        model.family.prepare_training(self.transformer, options)
        self.family, self.shape = model.family, shape
        self.latents, self.noise = (
            torch.randn(shape.batch, 16, *shape.latent_size) for _ in range(2)
        )
        width = config["joint_attention_dim"]
        self.texts = [torch.randn(count, width).bfloat16() for count in shape.text_tokens]

    @property
    def inputs(self) -> int:
        every = (self.latents, self.noise, *self.texts)
        return sum(tensor.numel() * tensor.element_size() for tensor in every)

    def losses(self) -> torch.Tensor:
        masks = [torch.ones(count, dtype=torch.bool) for count in self.shape.text_tokens]
        sigmas = torch.full((self.shape.batch,), 0.5)
        return flow_matching_loss(
            self.transformer,
            self.latents,
            self.texts,
            masks,
            self.noise,
            sigmas,
            family=self.family,
        )


# ---- bytes ---------------------------------------------------------------------------------------


LIST = ["attn.to_k", "img_mlp.net.2"]
SOME = [
    (torch.float32, "attention", SHAPES[0]),
    (torch.bfloat16, "all-linear+mod", SHAPES[1]),
    (torch.bfloat16, LIST, SHAPES[2]),
]
EVERY = [
    pytest.param(dtype, targets, shape, marks=pytest.mark.slow)
    for dtype in TYPES
    for targets in ("attention", "attention+text", "all-linear", "all-linear+mod", LIST)
    for shape in SHAPES
]


@pytest.mark.parametrize(("dtype", "targets", "shape"), [*SOME, *EVERY], ids=str)
def test_bytes_are_those_of_a_real_pass(
    tmp_path: Path, dtype: torch.dtype, targets: Any, shape: Shape
) -> None:
    """What is alive at the end of the forward pass and at the worst moment; the CPU's attention
    keeps a little less than a GPU's."""
    changes = {"lora_targets": targets, "modulation_table": False, "rank": 4}
    model = step_model(tmp_path, dtype, small(), **changes)
    for way in WAYS:
        cost = model.cost(shape, Recompute.parse(way))
        step = RealStep(model, shape, way)
        found = trace(step.losses, "cpu")
        kept = cost.activations - step.inputs
        assert kept == pytest.approx(found.kept, rel=0.01), way
        assert kept + cost.workspace == pytest.approx(found.peak, rel=0.01), way


@pytest.mark.parametrize(
    ("dtype", "targets"), [(torch.bfloat16, "attention"), (torch.float32, "all-linear")], ids=str
)
def test_what_autograd_saves(tmp_path: Path, dtype: torch.dtype, targets: str) -> None:
    """Counted another way: the storages that autograd packs, without parameters."""
    changes = {"lora_targets": targets, "modulation_table": False, "rank": 4}
    for shape, heads in zip(SHAPES, (2, 5, 9), strict=True):
        model = step_model(tmp_path, dtype, small(num_attention_heads=heads), **changes)
        step = RealStep(model, shape, "none")
        table = step.transformer.pos_embed.pos_freqs  # of the model, for all lengths of text
        before = {
            tensor.untyped_storage().data_ptr()
            for tensor in (table, *step.transformer.parameters())
        }
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, saved: Any = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = step.losses()
        expected = sum(s.nbytes() for at, s in saved.items() if at not in before)
        del losses
        kept = model.cost(shape, Recompute("none")).activations - step.inputs
        assert kept == pytest.approx(expected, rel=0.05)


def test_full_recomputation_keeps_the_blocks_inputs(tmp_path: Path) -> None:
    """The real model: both streams in front of each of 60 blocks."""
    model = step_model(tmp_path, torch.bfloat16, REAL)
    cost = model.cost(Shape((128, 128), (256,)), Recompute("full"))
    inputs = 60 * (4096 + 256) * 3072 * 2
    assert inputs < cost.activations < 1.03 * inputs


@pytest.mark.parametrize("way", ["none", "full", "3"])
def test_a_deep_model_from_shallow_ones(tmp_path: Path, way: str) -> None:
    """Three blocks and four tell of seven. With some blocks the peak may be a little too high."""
    deep = step_model(tmp_path, torch.bfloat16, small(num_layers=7))
    shape, recompute = SHAPES[1], Recompute.parse(way)
    cost, direct = deep.cost(shape, recompute), deep._trace(7, shape, recompute)
    assert cost.flops == direct.forward_flops + direct.backward_flops
    assert cost.activations == direct.kept
    peak = cost.activations + cost.workspace
    if recompute.kind == "some":
        assert direct.peak <= peak < 1.1 * direct.peak
    else:
        assert peak == direct.peak


EIGHT_BITS = [(kind, way) for kind in ("fp8", "int8") for way in ("none", "forward", "both")]


@pytest.mark.parametrize(("precision", "products"), EIGHT_BITS)
def test_bytes_of_8_bits_are_those_held(tiny_model: Path, precision: str, products: str) -> None:
    """To the byte: weights, scales, and the second copy of fp8 with products in both passes."""
    settings = Settings(
        base_precision=precision,
        low_precision_products=products,
        modulation_table=False,
        mixed_precision="bf16",
    )
    model = resolve_model(str(tiny_model), ("transformer",))
    real = load_base(model, settings, torch.device("cpu"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in real.state_dict().values())
    assert StepModel(model, settings, torch.bfloat16).weight_bytes == held


def test_nf4_bytes_are_bitsandbytes(tiny_model: Path) -> None:
    """But for code books."""
    bnb = pytest.importorskip("bitsandbytes")
    settings = Settings(base_precision="nf4", rank=4, modulation_table=False)
    model = resolve_model(str(tiny_model), ("transformer",))
    found = StepModel(model, settings, torch.bfloat16)
    real = model.family.load_transformer(
        model, device=torch.device("cpu"), dtype=torch.bfloat16, base_precision="nf4"
    )
    held = 0
    for name, tensor in real.state_dict().items():
        owner = real.get_submodule(name.split(".weight")[0]) if ".weight." in name else None
        if owner is not None and isinstance(owner, bnb.nn.Linear4bit):
            if not name.endswith(("absmax", "nested_absmax")):
                continue  # code books, a kilobyte a layer
        elif name.endswith("weight_format"):
            continue
        held += tensor.numel() * tensor.element_size()
    assert found.weight_bytes == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(("precision", "products"), [*EIGHT_BITS, ("nf4", "none")])
@pytest.mark.parametrize("way", ["none", "full"])
def test_what_a_quantised_base_keeps(
    tiny_model: Path, precision: str, products: str, way: str
) -> None:
    """With real layers, which keep nothing of their input; the peak is an upper bound."""
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    settings = Settings(
        base_precision=precision,
        low_precision_products=products,
        rank=4,
        modulation_table=False,
        mixed_precision="bf16",
    )
    model = resolve_model(str(tiny_model), ("transformer",))
    predicted = StepModel(model, settings, torch.bfloat16)
    shape = SHAPES[1]
    step = RealStep(predicted, shape, way, quantised=True)
    found = trace(step.losses, "cpu")
    cost = predicted.cost(shape, Recompute.parse(way))
    kept = cost.activations - step.inputs
    assert kept == pytest.approx(found.kept, rel=0.01)
    assert found.peak < 1.01 * (kept + cost.workspace)


def test_the_int8_product_is_bitsandbytes_own() -> None:
    """Every bit of its output and of the input's gradient."""
    bnb = pytest.importorskip("bitsandbytes")
    from qwen_lora.families.qwen_image.loading import int8_linear_class

    results = []
    for kind in (bnb.nn.Linear8bitLt, int8_linear_class()):
        random = torch.Generator().manual_seed(2)
        layer = kind(48, 64, has_fp16_weights=False, threshold=6.0)
        weight = torch.randn(64, 48, generator=random).bfloat16()
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.bias = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16), requires_grad=False)
        layer.to("cpu")
        x = torch.randn(2, 7, 48, generator=random).bfloat16()
        x[0, :, 3] *= 20  # outliers keep 16 bits
        x.requires_grad_()
        out = layer(x)
        out.backward(torch.randn(out.shape, generator=random).bfloat16())
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None
    assert torch.equal(results[0][1], results[1][1])


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_flops_are_torchs_counters(tmp_path: Path, way: str) -> None:
    aten = torch.ops.aten
    cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    model = step_model(tmp_path, torch.float32, small(), rank=4, lora_targets="all-linear")
    for shape in SHAPES[:2]:
        step = RealStep(model, shape, way)
        with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
            step.losses().sum().backward()
        assert model.cost(shape, Recompute.parse(way)).flops == counter.get_total_flops()


@pytest.mark.parametrize("side", [1024])
def test_flops_of_the_real_model(tmp_path: Path, side: int) -> None:
    """2 x tokens x weights in linears, 4 S^2 D in attention and 2.5 times that in its backward
    pass; the base's weights get no gradient. The LoRA and the last block's text are on top."""
    model = step_model(tmp_path, torch.bfloat16, REAL)
    image, text = (side // 16) ** 2, 256
    linears = 60 * 2 * (image + text) * 12 * 3072**2
    attention = 60 * 4 * (image + text) ** 2 * 3072
    cost = model.cost(Shape((side // 8, side // 8), (text,)), Recompute("none"))
    assert cost.forward_flops == pytest.approx(linears + attention, rel=0.01)
    # Nothing flows back into the first block's text and image inputs.
    assert cost.backward_flops == pytest.approx(linears + 2.5 * attention, rel=0.02)
    full = model.cost(Shape((side // 8, side // 8), (text,)), Recompute("full"))
    extra = full.backward_flops - cost.backward_flops
    assert extra == pytest.approx(linears + attention, rel=0.01)


# ---- what is held --------------------------------------------------------------------------------


def test_parameters_of_the_real_model(tmp_path: Path) -> None:
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        whole = QwenImageTransformer2DModel(**REAL)
    count = sum(parameter.numel() for parameter in whole.parameters())
    model = step_model(tmp_path, torch.bfloat16, REAL)
    assert model.parameters == count == 20_430_401_088
    modulation = sum(p.numel() for n, p in whole.named_parameters() if "_mod." in n)
    assert model.held_parameters == count - modulation
    assert model.weight_bytes == 2 * (count - modulation)  # 25.39 GiB
    assert model.lora_parameters == 60 * 4 * 16 * 2 * 3072
    assert model.lora_bytes == 16 * model.lora_parameters
    without = step_model(tmp_path, torch.bfloat16, REAL, modulation_table=False)
    assert without.weight_bytes == 2 * count == without.parameters * 2


@pytest.mark.parametrize(("optimizer", "each"), [("adamw", 16), ("prodigy", 24)])
def test_optimizer_bytes(tmp_path: Path, optimizer: str, each: int) -> None:
    """Float32 weights, gradients and what the optimizer itself keeps after a step."""
    from qwen_lora.train.optimizer import make_optimizer

    model = step_model(tmp_path, torch.float32, small(), optimizer=optimizer, learning_rate=1.0)
    assert model.lora_bytes == each * model.lora_parameters
    weight = torch.nn.Parameter(torch.ones(64, 64))
    made = make_optimizer([("a", weight)], model.settings)
    weight.grad = torch.ones_like(weight)
    made.step()
    kept = {
        value.untyped_storage().data_ptr(): value.numel() * value.element_size()
        for value in made.state[weight].values()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    assert (8 + sum(kept.values()) / weight.numel()) == each
