"""A step's least time where products run in 8 bits: their FLOPs, counted by hand and by torch's own
counter, and the rates of both kinds of product."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families import family_by_name
from qwen_lora.families.base import Recompute
from qwen_lora.families.qwen_image.scaled import FEW_ROWS, KINDS, PRODUCTS, ScaledLinear
from qwen_lora.models import resolve_model
from qwen_lora.train.cost import estimate, rates
from qwen_lora.train.cost.estimate import format_estimate
from qwen_lora.train.cost.rates import NOMINAL, Rate, Rates, find_rates
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from tests.train.test_step_cost import RealStep, step_model

CPU = torch.device("cpu")
FAMILY = family_by_name("qwen-image")
WAYS = ("none", "selective", "1", "3", "full")
# One prompt, prompts of different lengths, and one too short for products in 8 bits.
SHAPES = (Shape((32, 16), (20,)), Shape((16, 24), (9, 7, 7)), Shape((8, 16), (FEW_ROWS,)))
OPERATORS = {"fp8": torch.ops.aten._scaled_mm, "int8": torch.ops.aten._int_mm}


def by_hand(
    config: dict[str, Any], blocks: int, shape: Shape, products: str
) -> tuple[list[int], list[int]]:
    """Of each block, forward and backward: 2 x tokens x weights. `img_mlp.net.2` is multiplied in
    full, the last block's text is only looked at, and nothing flows back into the first block's
    inputs."""
    weights = (config["num_attention_heads"] * config["attention_head_dim"]) ** 2
    image = shape.batch * (shape.latent_size[0] // 2) * (shape.latent_size[1] // 2)
    text = sum(shape.text_tokens)
    image, text = (tokens if tokens > FEW_ROWS else 0 for tokens in (image, text))
    forward, backward = [], []
    for index in range(blocks):
        last = index == blocks - 1
        read = 3 * image + (2 if last else 3) * text  # q, k, v
        written = (1 + 4) * image + (0 if last else 1 + 4 + 4) * text  # output, MLP up, MLP down
        forward.append(2 * weights * (read + written))
        backward.append(2 * weights * (written + (read if index else 0)))
    if products == "none":
        forward = [0] * blocks
    return forward, backward if products == "both" else [0] * blocks


def anew(forward: list[int], recompute: Recompute) -> int:
    if recompute.kind == "selective":
        return 0  # what products give is kept
    chosen = (recompute.applies_to(index, len(forward)) for index in range(len(forward)))
    return sum(flops for flops, again in zip(forward, chosen, strict=True) if again)


def tiny_config(tiny_model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tiny_model / "transformer/config.json").read_text())
    return config


# ---- FLOPs ---------------------------------------------------------------------------------------


EVERY = [(kind, products, 2) for kind in KINDS for products in PRODUCTS]  # the tiny model's own
DEEP = [("fp8", "both", 7), ("int8", "forward", 7)]  # told from three blocks and four


@pytest.mark.parametrize(("kind", "products", "blocks"), [*EVERY, *DEEP])
def test_flops_in_8_bits_are_those_counted_by_hand(
    tiny_model: Path, tmp_path: Path, kind: str, products: str, blocks: int
) -> None:
    config = {**tiny_config(tiny_model), "num_layers": blocks}
    how = {"base_precision": kind, "low_precision_products": products}
    model = step_model(tmp_path, torch.bfloat16, config, rank=4, **how)
    for shape in SHAPES[1:2] if blocks > 2 else SHAPES:
        forward, backward = by_hand(config, blocks, shape, products)
        for way in WAYS:
            recompute = Recompute.parse(way)
            cost = model.cost(shape, recompute)
            assert cost.forward_low == sum(forward), way
            assert cost.backward_low == sum(backward) + anew(forward, recompute), way
            assert cost.low_flops <= cost.flops


def test_compiled_blocks_compute_a_share_anew(tiny_model: Path, tmp_path: Path) -> None:
    config = {**tiny_config(tiny_model), "num_layers": 7}
    how: dict[str, Any] = {"base_precision": "fp8", "low_precision_products": "both"}
    model = step_model(tmp_path, torch.bfloat16, config, rank=4, compile_blocks=True, **how)
    forward, backward = (sum(flops) for flops in by_hand(config, 7, SHAPES[0], "both"))
    for way, share in (("none", 0.0), ("3", 3 / 7), ("full", 1.0)):
        recompute = Recompute.parse(way)
        model._kept[SHAPES[0], recompute.budget(7)] = 0  # bytes, which take a while to find out
        cost = model.cost(SHAPES[0], recompute)
        assert cost.forward_low == forward
        assert cost.backward_low == backward + round(share * forward)


@pytest.mark.parametrize(("kind", "products"), [("fp8", "both"), ("int8", "forward")])
@pytest.mark.parametrize("way", ["none", "selective", "1"])
def test_flops_in_8_bits_are_those_of_a_real_pass(
    tiny_model: Path, kind: str, products: str, way: str
) -> None:
    settings = Settings(
        base_precision=kind,
        low_precision_products=products,
        rank=4,
        modulation_table=False,
        mixed_precision="bf16",
    )
    model = StepModel(resolve_model(str(tiny_model), ("transformer",)), settings, torch.bfloat16)
    step = RealStep(model, SHAPES[1], way, quantised=True)
    integers = {torch.ops.aten._int_mm: lambda a, b, **_: mm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=integers) as counter:
        losses = step.losses()
        forward = counter.get_flop_counts()["Global"][OPERATORS[kind]]
        losses.sum().backward()
    cost = model.cost(SHAPES[1], Recompute.parse(way))
    assert cost.forward_low == forward > 0
    assert cost.low_flops == counter.get_flop_counts()["Global"][OPERATORS[kind]]


# ---- rates ---------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """What products in 8 bits are given: types, sizes, strides."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in OPERATORS.values():
            tensors = [
                (name, value.dtype, value.shape, value.stride())
                for name, value in [*enumerate(args), *(kwargs or {}).items()]
                if isinstance(value, torch.Tensor)
            ]
            rest = {k: v for k, v in (kwargs or {}).items() if not isinstance(v, torch.Tensor)}
            self.seen.append((func, tensors, rest))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_timed_is_what_the_layers_run(kind: str) -> None:
    """Forward and backward: the same operator on the same layouts, with a scale for each row."""
    side = 64
    made = torch.nn.Linear(side, side, bias=False, dtype=torch.bfloat16)
    layer = ScaledLinear(made, kind, "both")
    layer.put(made.weight.detach(), CPU)
    x = torch.ones(side, side, dtype=torch.bfloat16, requires_grad=True)
    with Calls() as layers:
        layer(x).sum().backward()
    product = FAMILY.low_precision_product(kind, side, CPU)
    with Calls() as timed:
        product()
    assert timed.seen * 2 == layers.seen
    assert timed.seen[0][0].overloadpacket is OPERATORS[kind]


def test_a_floor_has_both_rates() -> None:
    both = Rates(Rate(2.0, "given"), Rate(8.0, "given"))
    assert both.seconds(20, 16) == 4 / 2 + 16 / 8
    assert Rates(Rate(2.0, "given"), None).seconds(20, 0) == 10


class Old(type(FAMILY)):  # type: ignore[misc]
    """On a GPU that has no such products."""

    def low_precision_product(self, kind: str, side: int, device: torch.device) -> Any:
        raise InputError("needs a GPU of compute capability 8.9")


def test_where_rates_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_machine", lambda: (CPU, 64))
    for kind in KINDS:
        found = find_rates(FAMILY, kind)
        assert found.low and (found.full.origin, found.low.origin) == ("measured", "measured")
        assert found.full.flops > 0 and found.low.flops > 0
    assert find_rates(FAMILY, None, None, 7.0).low is None
    assert find_rates(FAMILY, "fp8", 2.0, 7.0) == Rates(Rate(2e12, "given"), Rate(7e12, "given"))
    assumed = Rate(NOMINAL * 2e12, "assumed")
    assert find_rates(FAMILY, "fp8", 2.0) == Rates(Rate(2e12, "given"), assumed)
    measured = find_rates(FAMILY, "int8", None, 7.0)
    assert measured.full.origin == "measured" and measured.low == Rate(7e12, "given")
    old = find_rates(Old(), "fp8")
    assert old.low == Rate(NOMINAL * old.full.flops, "assumed")


# ---- the command ---------------------------------------------------------------------------------


ROW = {"base_precision": "fp8", "side": 512, "full": {"gib": 1.0, "card_gb": 8}}
LOW = ("--set", "base_precision=fp8", "--set", "low_precision_products=both")


def plan(shards: Path, model: Path, *others: str) -> dict[str, Any]:
    arguments = ["plan", str(shards), "--model", str(model), "--json", *others]
    arguments += ["--set", "train_batch_size=8"]  # of images of 4 and 8 tokens
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_plan_says_both_rates(
    train_shards: Path, transformer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_table", lambda *_: [{**ROW, "blocks_on_device": {"8": 2}}])
    given = ("--tflops", "1e-3", "--tflops-8bit", "4e-3")
    facts = plan(train_shards, transformer_only, *given, *LOW)
    whole, in_8_bits = facts["flops_per_step"], facts["flops_per_step_8bit"]
    assert 0 < in_8_bits < whole
    seconds = (whole - in_8_bits) / 1e9 + in_8_bits / 4e9
    assert facts["floor_seconds_per_step"] == pytest.approx(seconds)
    assert (facts["rate_8bit_tflops"], facts["rate_8bit_from"]) == (pytest.approx(4e-3), "given")
    text = format_estimate(facts)
    assert "TFLOP at 0.001 TFLOP/s (as given) and " in text
    assert " TFLOP in fp8 products at 0.004 TFLOP/s (as given)\n" in text

    facts = plan(train_shards, transformer_only, *given[:2], *LOW)
    seconds = (whole - in_8_bits) / 1e9 + in_8_bits / 2e9
    assert facts["floor_seconds_per_step"] == pytest.approx(seconds)
    assert "at 0.002 TFLOP/s (assumed, 2 x the other; --tflops-8bit" in format_estimate(facts)

    facts = plan(train_shards, transformer_only, *given, "--set", "base_precision=fp8")
    assert facts["flops_per_step_8bit"] == 0 and facts["rate_8bit_from"] is None
    assert facts["floor_seconds_per_step"] == pytest.approx(facts["flops_per_step"] / 1e9)
    assert " at 0.001 TFLOP/s (as given)\n" in format_estimate(facts)
