"""Any optimizer's state survives tensors and JSON without a bit of difference, or is refused."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.train.optimizer import make_optimizer
from qwen_lora.train.optimizer_state import (
    NamedParameters,
    check_round_trip,
    check_state_fits,
    pack_optimizer,
    unpack_optimizer,
)
from qwen_lora.train.tree import pack, unpack

CPU = torch.device("cpu")


def test_trees_survive() -> None:
    tree = {
        "betas": (0.9, 0.999),
        "inf": [math.inf, -math.inf],
        "none": None,
        "flag": True,
        "nested": {0: torch.arange(3), "x": {"y": torch.zeros(())}},
        "number": 0.1 + 0.2,
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(tree, "t", tensors), allow_nan=False))
    back = unpack(packed, load(save(tensors)))
    torch.testing.assert_close(back, tree, rtol=0, atol=0)
    assert back["betas"] == (0.9, 0.999) and 0 in back["nested"]


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(QwenLoraError, match="t/key holds a function"):
        pack({"key": lambda: None}, "t", {})


def _adamw(parameters: NamedParameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in parameters], lr=1e-3, amsgrad=True)


def _sgd(parameters: NamedParameters) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in parameters], lr=1e-3, momentum=0.9)


def _groups(parameters: NamedParameters) -> torch.optim.Optimizer:
    first, *rest = [p for _, p in parameters]
    return torch.optim.Adagrad([{"params": rest, "lr": 0.5}, {"params": [first]}], lr=0.1)


def _prodigy(parameters: NamedParameters) -> torch.optim.Optimizer:
    prodigyopt = pytest.importorskip("prodigyopt")
    optimizer: torch.optim.Optimizer = prodigyopt.Prodigy([p for _, p in parameters], lr=1.0)
    return optimizer


def _adamw8bit(parameters: NamedParameters) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit([p for _, p in parameters])
    return optimizer


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
@pytest.mark.parametrize("make", [_adamw, _sgd, _groups, _prodigy, _adamw8bit])
def test_optimizers_survive(make: Any) -> None:
    check_round_trip(make, CPU)


def test_state_is_found_by_name_in_any_order() -> None:
    """A checkpoint stays good when parameters are listed in another order."""
    parameters = [(name, torch.nn.Parameter(torch.ones(2))) for name in "ab"]
    optimizer = _adamw(parameters)
    for number, (_, parameter) in enumerate(parameters):
        parameter.grad = torch.full((2,), float(number + 1))
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_optimizer(optimizer, parameters, tensors)
    assert "a/exp_avg" in tensors and "b/exp_avg_sq" in tensors
    turned = list(reversed(parameters))
    other = _adamw(turned)
    unpack_optimizer(other, turned, packed, tensors)
    for _, parameter in parameters:
        torch.testing.assert_close(
            other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"]
        )


class Forgetful(torch.optim.SGD):
    """Keeps a count outside its state dict, as some optimizers do."""

    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 1e-3 * self.count
        super().step(closure)


class Unsaveable(torch.optim.SGD):
    """Keeps an object in its state."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = {object()}


@pytest.mark.parametrize("kind", [Forgetful, Unsaveable])
def test_an_optimizer_that_cannot_resume_is_refused_before_training(kind: Any) -> None:
    with pytest.raises(InputError, match=f"{kind.__name__}: its state does not survive"):
        check_round_trip(lambda named: kind([p for _, p in named], lr=1e-3), CPU)


def test_an_optimizer_for_sparse_gradients_is_one_clear_error() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam([parameter for _, parameter in parameters])

    with pytest.raises(InputError, match="SparseAdam cannot train a LoRA"):
        check_round_trip(make, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adamw", {}),
        ("adamw8bit", {"min_8bit_size": 64}),
        ("prodigy", {}),  # keeps the start of a zero matrix as one number
        ("torch.optim.Adagrad", {}),
        ("torch.optim.Adafactor", {}),  # a row and a column
        ("torch.optim.SGD", {"momentum": 0.9}),
    ],
)
def test_state_of_other_shapes_is_refused(name: str, arguments: dict[str, Any]) -> None:
    """Fused kernels would write beyond it."""
    pytest.importorskip({"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(name, "torch"))
    settings = Settings(optimizer=name, optimizer_args=arguments)

    def make(parameters: NamedParameters) -> torch.optim.Optimizer:
        return make_optimizer(parameters, settings)

    shapes = {"a.lora_A": (4, 48), "a.lora_B": (48, 4), "b.lora_A": (4, 16)}
    parameters = [
        (name, torch.nn.Parameter(torch.randn(shape) * ("A" in name)))
        for name, shape in shapes.items()
    ]
    optimizer = make(parameters)
    nothing: dict[str, torch.Tensor] = {}
    check_state_fits(make, parameters, pack_optimizer(optimizer, parameters, nothing), nothing)
    for _ in range(3):
        for _, parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_optimizer(optimizer, parameters, tensors)
    check_state_fits(make, parameters, packed, tensors)
    for key, tensor in tensors.items():
        for other in (tensor.new_zeros(3, 5), tensor.to(torch.float64)):
            with pytest.raises(QwenLoraError, match=f"does not fit this run: {key} is"):
                check_state_fits(make, parameters, packed, {**tensors, key: other})
        with pytest.raises(QwenLoraError, match=f"{key} is missing"):
            rest = {other: tensors[other] for other in tensors if other != key}
            check_state_fits(make, parameters, packed, rest)
    flags = [k for k, v in packed["groups"][0].items() if v is None or isinstance(v, bool)]
    for key in flags:
        forged = {**packed, "groups": [{**packed["groups"][0], key: "odd"}]}
        with pytest.raises(QwenLoraError, match=f"has {key} 'odd'"):
            check_state_fits(make, parameters, forged, tensors)
