"""LoRA layers: where they go, how they start, what they compute, what trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_model import CPU, lora_model, predict, shake

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.models import resolve_model
from qwen_lora.train.lora import INITS, LoraSpec, add_lora, load_lora_state, lora_layers, lora_state
from qwen_lora.train.transformer import load_base

TARGETS = ("attention", "attention+text", "all-linear", "all-linear+mod")


def base_prediction(folder: Path, **changes: Any) -> torch.Tensor:
    model = resolve_model(str(folder), ("transformer",))
    settings = Settings(gradient_checkpointing=False, **changes)
    with torch.no_grad():
        return predict(model, load_base(model, settings, CPU))


# ---- where -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "per_block", "dead"),
    [*zip(TARGETS, (4, 8, 12, 14), (0, 2, 4, 4), strict=True)],
)
def test_named_targets(transformer_only: Path, targets: str, per_block: int, dead: int) -> None:
    made = lora_model(transformer_only, lora_targets=targets)
    blocks = len(made.transformer.transformer_blocks)
    layers = lora_layers(made.transformer)
    assert len(layers) == blocks * per_block - dead
    assert len(made.parameters) == 2 * len(layers)
    assert {n for n, p in made.transformer.named_parameters() if p.requires_grad} == {
        name for name, _ in made.parameters
    }


def test_listed_targets(transformer_only: Path) -> None:
    made = lora_model(transformer_only, lora_targets=["img_in", "attn.to_q"])
    assert [*lora_layers(made.transformer)][0] == "img_in"
    with pytest.raises(InputError, match="to_z"):
        lora_model(transformer_only, lora_targets=["attn.to_z"])


# ---- start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("init", INITS)
def test_a_new_lora_changes_nothing(
    transformer_only: Path, init: str, mixed_precision: str
) -> None:
    """To the last bit, in every precision."""
    made = lora_model(
        transformer_only, lora_init=init, mixed_precision=mixed_precision, lora_targets="all-linear"
    )
    assert all(parameter.dtype == torch.float32 for _, parameter in made.parameters)
    with torch.no_grad():
        adapted = made.predict()
    assert torch.equal(adapted, base_prediction(transformer_only, mixed_precision=mixed_precision))


def test_start_is_a_function_of_seed_and_name(transformer_only: Path) -> None:
    """Whatever torch's generator, the precision of the base, and other targets there are."""
    first = lora_state(lora_model(transformer_only).transformer)
    torch.manual_seed(1234)
    changes = {"mixed_precision": "bf16", "lora_targets": "all-linear"}
    second = lora_state(lora_model(transformer_only, **changes).transformer)
    assert len(second) > len(first)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    other = lora_state(lora_model(transformer_only, seed=1).transformer)
    downs = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in downs)
    assert len({first[name].numpy().tobytes() for name in downs}) == len(downs)


def test_golden_start(transformer_only: Path) -> None:
    """Resumed runs and several ranks need the same numbers on every machine and numpy."""
    state = lora_state(lora_model(transformer_only).transformer)
    values = state["transformer_blocks.0.attn.to_q.lora_A.default.weight"].flatten()[:4]
    golden = [-0.19290995597839355, -0.6489604115486145, -0.1970755010843277, 0.1391313225030899]
    np.testing.assert_array_equal(values.numpy(), np.array(golden, np.float32))


@pytest.mark.parametrize("init", INITS)
def test_spread_of_the_starts(transformer_only: Path, init: str) -> None:
    """As PEFT's own, measured over all layers of a LoRA of rank 8."""
    ours = lora_model(transformer_only, rank=8, lora_init=init, lora_targets="all-linear")
    theirs: Any = load_base(ours.model, Settings(), CPU)
    config = copy.deepcopy(ours.transformer.peft_config["default"])
    config.init_lora_weights = True if init == "kaiming" else init
    torch.manual_seed(0)
    theirs.add_adapter(config)
    for kind in ("lora_A", "lora_B"):
        spreads = []
        for transformer in (ours.transformer, theirs):
            layers = lora_layers(transformer).values()
            weights = [getattr(layer, kind)["default"].weight.flatten() for layer in layers]
            spreads.append(float(torch.cat(weights).detach().std()))
        assert spreads[0] == pytest.approx(spreads[1], rel=0.05)


def test_starts_that_are_refused() -> None:
    facts = {"rank": 4, "alpha": 4.0, "dropout": 0.0, "use_rslora": False, "targets": "attention"}
    with pytest.raises(InputError, match="rewrite the base"):
        LoraSpec(**facts, init="pissa")
    with pytest.raises(InputError, match="even rank, not 3"):
        LoraSpec.from_settings(Settings(rank=3, lora_init="orthogonal"))


# ---- what it computes --------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_float32_equals_peft(transformer_only: Path, use_rslora: bool) -> None:
    """Prediction and gradients, to the last bit, dropout included."""
    made = lora_model(
        transformer_only,
        lora_alpha=7,
        lora_dropout=0.2,
        use_rslora=use_rslora,
        lora_targets="all-linear",
    )
    shake(made)
    base = load_base(made.model, Settings(gradient_checkpointing=False), CPU)
    base.add_adapter(copy.deepcopy(made.transformer.peft_config["default"]))  # type: ignore[operator]
    base.load_state_dict(made.transformer.state_dict())
    results = []
    for transformer in (made.transformer, base):
        transformer.train()
        torch.manual_seed(3)
        prediction = predict(made.model, transformer)
        prediction.square().mean().backward()
        results.append((prediction, [p.grad for p in transformer.parameters() if p.requires_grad]))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert torch.equal(ours, theirs)
    assert len(our_gradients) == len(made.parameters)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert torch.equal(one, other)


def test_bfloat16_multiplies_in_bfloat16(transformer_only: Path) -> None:
    """Near PEFT's float32 product, with float32 gradients, and no float32 activation between."""
    made = lora_model(transformer_only, mixed_precision="bf16")
    shake(made)
    layer = lora_layers(made.transformer)["transformer_blocks.0.attn.to_q"]
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    types = []
    for part in (layer.lora_A, layer.lora_B):
        part["default"].register_forward_hook(lambda *a: types.append(a[2].dtype))
    ours = layer(x.bfloat16())
    ours.float().sum().backward()
    assert types == [torch.bfloat16] * 2 and ours.dtype == torch.bfloat16
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.grad.dtype == up.grad.dtype == torch.float32
    delta = x.bfloat16().float() @ down.T @ up.T * layer.scaling["default"]
    base = layer.base_layer(x.bfloat16()).float()
    torch.testing.assert_close(ours.float() - base, delta, rtol=0.05, atol=0.02)


def test_gradient_checkpointing_changes_no_gradient(transformer_only: Path) -> None:
    gradients = []
    for on in (False, True):
        made = lora_model(transformer_only, gradient_checkpointing=on, lora_dropout=0.3)
        shake(made)
        made.transformer.train()
        torch.manual_seed(2)
        made.predict().square().mean().backward()
        gradients.append([parameter.grad for _, parameter in made.parameters])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---- what trains -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("targets", TARGETS)
def test_all_of_the_lora_trains_and_nothing_else(
    transformer_only: Path, targets: str, init: str
) -> None:
    made = lora_model(transformer_only, lora_targets=targets, lora_init=init)
    before = {name: p.detach().clone() for name, p in made.transformer.named_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in made.parameters], lr=1e-3)
    reached: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        (made.predict() - 1).square().mean().backward()
        reached |= {n for n, p in made.parameters if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    names = {name for name, _ in made.parameters}
    assert reached == names
    after = dict(made.transformer.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own, when imported
@pytest.mark.parametrize("base_precision", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_low_precision_base(
    transformer_only: Path, base_precision: str, mixed_precision: str
) -> None:
    if base_precision == "nf4":
        pytest.importorskip("bitsandbytes")
    changes = {"base_precision": base_precision, "mixed_precision": mixed_precision}
    made = lora_model(transformer_only, lora_targets="all-linear+mod", **changes)
    kinds = {type(layer).__name__ for layer in lora_layers(made.transformer).values()}
    # PEFT's plain layer, and with a plain base where the base keeps its precision.
    assert kinds == ({"Linear4bit"} if base_precision == "nf4" else {"Linear"})
    with torch.no_grad():
        assert torch.equal(made.predict(), base_prediction(transformer_only, **changes))
    optimizer = torch.optim.AdamW([p for _, p in made.parameters], lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (made.predict() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in made.parameters:
        assert parameter.dtype == torch.float32, name
        assert bool(parameter.grad.any()), name  # type: ignore[union-attr]


# ---- state -------------------------------------------------------------------------------------


def test_state_by_name(transformer_only: Path) -> None:
    first, second = lora_model(transformer_only), lora_model(transformer_only, seed=8)
    shake(first)
    state = {name: tensor.clone() for name, tensor in lora_state(first.transformer).items()}
    assert [*state] == [name for name, _ in first.parameters]
    load_lora_state(second.transformer, dict(reversed(state.items())))
    with torch.no_grad():
        assert torch.equal(first.predict(), second.predict())
    assert all(parameter.requires_grad for _, parameter in second.parameters)
    with pytest.raises(QwenLoraError, match="other layers"):
        load_lora_state(second.transformer, dict([*state.items()][1:]))
    with pytest.raises(QwenLoraError, match=r"is \[4, "):
        load_lora_state(lora_model(transformer_only, rank=2).transformer, state)


def test_the_family_names_the_layers(transformer_only: Path) -> None:
    """PEFT adapts exactly the listed modules, although it shortens long lists of names."""
    made = lora_model(transformer_only, lora_targets="all-linear+mod")
    plain = load_base(made.model, Settings(gradient_checkpointing=False), CPU)
    expected = made.model.family.lora_target_modules(plain, "all-linear+mod")
    assert [*lora_layers(made.transformer)] == expected
    add_lora(plain, made.spec, made.model.family, 0)
    assert lora_state(plain).keys() == lora_state(made.transformer).keys()
