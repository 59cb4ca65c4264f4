"""Optimizers by name and by class: what they get, what is refused before the first step."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.train.optimizer import make_optimizer
from qwen_lora.train.optimizer_state import check_round_trip

CPU = torch.device("cpu")


def make(**changes: Any) -> torch.optim.Optimizer:
    parameters = [("a", torch.nn.Parameter(torch.ones(80, 64)))]
    return make_optimizer(parameters, Settings(**changes))


def test_adamw_is_torchs_fused_with_the_settings() -> None:
    optimizer = make(
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        adam_weight_decay=0.1,
        learning_rate=0.02,
    )
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    expected = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    assert {key: group[key] for key in expected} == expected


def test_fused_equals_plain() -> None:
    """Up to rounding: the fused kernel is faster, not another optimizer."""
    assert not make(optimizer_args={"foreach": True}).param_groups[0]["fused"]
    results = []
    for fused in (True, False):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 500).view(20, 25))
        settings = Settings(optimizer_args={"fused": fused}, learning_rate=1e-2)
        optimizer = make_optimizer([("a", parameter)], settings)
        for step in range(5):
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own, when imported
@pytest.mark.parametrize(
    ("name", "module", "class_name"),
    [("adamw8bit", "bitsandbytes", "AdamW8bit"), ("prodigy", "prodigyopt", "Prodigy")],
)
def test_optimizers_of_extras(
    name: str, module: str, class_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(module)
    optimizer = make(optimizer=name, adam_weight_decay=0.05, learning_rate=1.0)
    assert type(optimizer).__name__ == class_name
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["lr"], tuple(group["betas"])) == (0.05, 1.0, (0.9, 0.999))
    assert capsys.readouterr().out == ""
    settings = Settings(optimizer=name, learning_rate=1.0)
    check_round_trip(lambda parameters: make_optimizer(parameters, settings), CPU)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("adamw8bit", "bitsandbytes.optim", "quant"), ("prodigy", "prodigyopt", "prodigy")],
)
def test_a_missing_extra_is_named(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(InputError, match=rf"pip install 'qwen-lora\[{extra}\]'"):
        make(optimizer=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "torch.optim.SGD", "optimizer_args": {"momentum": 0.9}},
        {"optimizer": "torch.optim.Adagrad"},
        {"optimizer": "torch.optim.RAdam", "optimizer_args": {"betas": [0.9, 0.99]}},
        {"optimizer": "torch.optim.Adafactor"},
        {"optimizer": "torch.optim.Muon"},
        {"optimizer": "torch.optim.adamw.AdamW", "optimizer_args": {"amsgrad": True}},
    ],
    ids=lambda changes: changes["optimizer"],
)
def test_any_class_steps_and_survives_a_checkpoint(changes: dict[str, Any]) -> None:
    if not hasattr(torch.optim, changes["optimizer"].rpartition(".")[2]):
        pytest.skip("not in this torch")
    settings = Settings(**changes, learning_rate=1e-2)
    check_round_trip(lambda parameters: make_optimizer(parameters, settings), CPU)
    (group,) = make(**changes).param_groups
    for key, value in settings.optimizer_args.items():
        assert group[key] == (tuple(value) if isinstance(value, list) else value)


def test_other_classes_keep_their_own_defaults() -> None:
    """Until an adam_* setting is changed; given or not, its default value changes nothing."""
    (own,) = make(optimizer="torch.optim.Adagrad", adam_weight_decay=0.01).param_groups
    assert (own["weight_decay"], own["eps"]) == (0, 1e-10)
    changed = make(optimizer="torch.optim.Adagrad", adam_weight_decay=0.02, adam_epsilon=1e-7)
    assert changed.param_groups[0]["weight_decay"] == 0.02
    assert changed.param_groups[0]["eps"] == 1e-7
    args = {"weight_decay": 0.5}
    (wins,) = make(
        optimizer="torch.optim.SGD", adam_weight_decay=0.02, optimizer_args=args
    ).param_groups
    assert wins["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "no_such_module.Adam"}, "no_such_module cannot be imported"),
        ({"optimizer": "torch.optim.Adagrat"}, r"no 'Adagrat' \(did you mean 'Adagrad'\?\)"),
        ({"optimizer": "torch.nn.Linear"}, "not a torch optimizer class"),
        ({"optimizer": "torch.optim.lr_scheduler.LambdaLR"}, "not a torch optimizer class"),
        ({"optimizer": "torch.optim.LBFGS"}, "needs a closure"),
        (
            {"optimizer_args": {"amsgrads": True}},
            r"adamw takes no 'amsgrads' \(did you mean 'amsgrad'\?\); it takes amsgrad, ",
        ),
        ({"optimizer_args": {"lr": 1e-3}}, "learning_rate"),
        ({"optimizer": "torch.optim.SGD", "adam_beta2": 0.9}, "adam_beta2 has no effect"),
        (
            {"optimizer": "torch.optim.SGD", "optimizer_args": {"momentum": -1}},
            "torch.optim.SGD refuses its arguments: Invalid momentum",
        ),
        ({"optimizer_args": {"betas": "wide"}}, "adamw refuses its arguments"),
        ({"optimizer_args": {"fused": True, "foreach": True}}, "adamw refuses its arguments"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        make(**changes)
    assert "\n" not in str(refused.value)


def test_a_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_optimizers.py").write_text("raise RuntimeError('no such card')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot be imported: RuntimeError: no such card"):
        make(optimizer="broken_optimizers.Best")
