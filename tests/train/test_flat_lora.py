"""A LoRA's tensors as one for AdamW: not a bit differs from one after the other, and nobody else
sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupt
from random_sets import MakeSettings

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.train import optimizer as optimizers
from qwen_lora.train.flat import FlatLora
from qwen_lora.train.optimizer import build_optimizer
from qwen_lora.train.optimizer_state import pack_optimizer, unpack_optimizer
from qwen_lora.train.run import train
from qwen_lora.train.step import Stepper

SHAPES = {"a.lora_A": (4, 48), "a.lora_B": (48, 4), "b.lora_A": (4, 20), "b.lora_B": (16, 4)}


def files(settings: Settings) -> dict[str, bytes]:
    """The LoRA and the checkpoints of a finished run."""
    run = Path(settings.output_dir)
    paths = [run / "lora.safetensors", *sorted((run / "checkpoints").rglob("*.*"))]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs with `apart(True)` before them give the optimizer every tensor by itself."""
    plain = optimizers.fits
    return lambda on: monkeypatch.setattr(optimizers, "fits", (lambda *_: False) if on else plain)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors the optimizer of each Stepper has."""
    found: list[int] = []
    plain = Stepper.__init__

    def make(self: Stepper, *arguments: Any) -> None:
        plain(self, *arguments)
        found.append(sum(len(group["params"]) for group in self.optimizer.param_groups))

    monkeypatch.setattr(Stepper, "__init__", make)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.01, "lr_scheduler": "cosine", "lora_dropout": 0.1},
        {"max_grad_norm": 0, "gradient_accumulation_steps": 2},
        pytest.param(
            {"max_grad_norm": 0.01, "gradient_accumulation_steps": 3, "rank": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param({"optimizer_args": {"amsgrad": True}}, marks=pytest.mark.slow),
        pytest.param({"mixed_precision": "fp16"}, marks=pytest.mark.slow),
    ],
    ids=["clipped", "accumulated", "both", "amsgrad", "fp16"],
)
def test_not_a_bit_differs(
    make_settings: MakeSettings, apart: Any, counted: list[int], changes: dict[str, Any]
) -> None:
    """20 steps: together, one by one, and begun the one way and resumed the other. The LoRA and the
    files of all checkpoints are the same."""
    apart(True)
    expected_run = make_settings("apart", **changes)
    train(expected_run)
    expected = files(expected_run)
    for name, begins in (("together", None), ("joined", True), ("split", False)):
        settings = make_settings(name, **changes)
        if begins is not None:
            apart(begins)
            interrupt(settings, 10)
        apart(begins is False)
        train(settings)
        found = files(settings)
        differing = [file for file in expected if found.get(file) != expected[file]]
        assert not differing and found.keys() == expected.keys(), (name, differing)
    many = max(counted)
    assert many > 9 and counted == [many, 1, many, 1, 1, many]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_compiled_blocks(make_settings: MakeSettings, apart: Any) -> None:
    changes = {"compile_blocks": True, "gradient_checkpointing": True, "max_train_steps": 3}
    results = []
    for on in (True, False):
        apart(on)
        results.append(train(make_settings(f"apart-{on}", **changes)).lora.read_bytes())
    assert results[0] == results[1]


def test_clipping_was_active(make_settings: MakeSettings) -> None:
    """Or the test above would show nothing."""
    results = [
        train(make_settings(f"norm{norm}", max_grad_norm=norm, max_train_steps=2)).lora.read_bytes()
        for norm in (0.01, 0)
    ]
    assert results[0] != results[1]


def named(seed: int = 0) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, torch.nn.Parameter(torch.randn(shape, generator=generator)))
        for name, shape in SHAPES.items()
    ]


def test_parameters_and_gradients_stay_views() -> None:
    """Their values, names and shapes stay; backward passes add in place to the same memory, which
    clearing keeps."""
    parameters, twins = named(), named()
    flat = FlatLora(parameters)
    storages = {p.untyped_storage().data_ptr() for _, p in parameters}
    assert storages == {flat.weight.untyped_storage().data_ptr()}
    gradients = [parameter.grad for _, parameter in parameters]
    for _ in range(2):
        flat.gradients.clear()
        for _, twin in twins:
            twin.grad = None
        for weight in (1.0, 0.5, 0.0):
            for several in (parameters, twins):
                sum(p.sin().sum() * weight for _, p in several).backward()  # type: ignore[union-attr]
        for (name, parameter), (_, twin), gradient in zip(
            parameters, twins, gradients, strict=True
        ):
            assert parameter.grad is gradient and gradient is not None, name
            assert parameter.shape == SHAPES[name] and parameter.is_leaf
            assert torch.equal(parameter, twin)
            assert twin.grad is not None and torch.equal(gradient, twin.grad)
    assert flat.weight.grad is not None
    assert flat.weight.grad.count_nonzero() == sum(p.numel() for _, p in parameters)
    with torch.no_grad():
        flat.weight.mul_(2)
    assert all(
        torch.equal(p, 2 * twin) for (_, p), (_, twin) in zip(parameters, twins, strict=True)
    )


def test_a_step_of_the_trainer_keeps_the_views(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, clipping, update and saving replace no memory."""
    places: list[set[int]] = []
    plain = Stepper.run

    def run(self: Stepper, *arguments: Any) -> None:
        plain(self, *arguments)
        assert self.flat is not None and self.flat.weight.grad is not None
        here = {self.flat.weight.data_ptr(), self.flat.weight.grad.data_ptr()}
        storages = [self.flat.weight.untyped_storage(), self.flat.weight.grad.untyped_storage()]
        allowed = {storage.data_ptr() for storage in storages}
        for parameter in self.parameters:
            assert parameter.grad is not None
            for tensor in (parameter, parameter.grad):
                assert tensor.untyped_storage().data_ptr() in allowed
        places.append(here)

    monkeypatch.setattr(Stepper, "run", run)
    train(make_settings(max_train_steps=3, gradient_accumulation_steps=2, checkpointing_steps=1))
    assert len(places) == 3 and len(set(map(frozenset, places))) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer_args": {"foreach": True}},
        {"optimizer_args": {"fused": False}},
        {"optimizer": "torch.optim.AdamW"},
        {"optimizer": "torch.optim.Adafactor"},
    ],
)
def test_others_have_their_parameters(changes: dict[str, Any]) -> None:
    parameters = named()
    optimizer, flat = build_optimizer(parameters, Settings(**changes))
    assert flat is None and optimizer.param_groups[0]["params"] == [p for _, p in parameters]


def test_sizes_that_a_cpu_rounds_differently() -> None:
    """Its kernel takes 16 numbers at a time."""
    odd = [*named(), ("c", torch.nn.Parameter(torch.ones(3, 5)))]
    assert build_optimizer(odd, Settings())[1] is None
    assert build_optimizer(named(), Settings())[1] is not None


def stepped() -> tuple[Any, list[tuple[str, torch.nn.Parameter]], FlatLora]:
    parameters = named()
    optimizer, flat = build_optimizer(parameters, Settings())
    assert flat is not None
    for _, parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(parameter.detach().cos())
    optimizer.step()
    return optimizer, parameters, flat


def test_state_by_name_in_any_order() -> None:
    """As of an optimizer over the parameters themselves."""
    optimizer, parameters, flat = stepped()
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_optimizer(optimizer, parameters, tensors, flat)
    twins = named()
    for _, twin in twins:
        twin.grad = twin.detach().cos()
    apart = torch.optim.AdamW([p for _, p in twins], fused=True)
    apart.step()
    for name, twin in twins:
        for key, value in apart.state[twin].items():
            assert torch.equal(tensors[f"{name}/{key}"], value)
            assert tensors[f"{name}/{key}"].dtype == value.dtype
    turned = list(reversed(named()))
    other, again = build_optimizer(turned, Settings())
    assert again is not None
    unpack_optimizer(other, turned, packed, tensors, again)
    found: dict[str, torch.Tensor] = {}
    pack_optimizer(other, turned, found, again)
    torch.testing.assert_close(found, tensors, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["other parameters", "other steps"])
def test_state_that_does_not_belong_together_is_refused(what: str) -> None:
    optimizer, parameters, flat = stepped()
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_optimizer(optimizer, parameters, tensors, flat)
    if what == "other parameters":
        packed["groups"][0]["params"][0] = "z.lora_A"
    else:
        tensors["b.lora_A/step"] += 1
    said = {"other parameters": "is of other parameters", "other steps": "more than one step"}[what]
    with pytest.raises(QwenLoraError, match=said):
        unpack_optimizer(optimizer, parameters, packed, tensors, flat)
