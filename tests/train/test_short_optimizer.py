"""GPU memory that is too small for the optimizer: one line that says what would fit, or the same
again with fewer blocks on the device, to the bytes of a run that never ran out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupt
from random_sets import MakeSettings

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.train import assemble
from qwen_lora.train import optimizer as optimizers
from qwen_lora.train.flat import FlatLora
from qwen_lora.train.optimizer import build_optimizer
from qwen_lora.train.run import train
from qwen_lora.train.step import Stepper

FALLBACK = {"oom_fallback": True}
Runs = Callable[..., bytes]


def strike(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Fails:
    """Calls a function, and runs out of memory at its calls number `at` (from 1), before or `after`
    it has done its work. With `on` false calls are not counted."""

    def __init__(self, plain: Any, at: set[int], after: bool = False, on: bool = True) -> None:
        self.plain, self.at, self.after, self.on = plain, at, after, on
        self.calls = self.struck = 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.calls += self.on
        fails = self.on and self.calls in self.at
        self.struck += fails
        result = None if fails and not self.after else self.plain(*arguments, **more)
        if fails:
            strike()
        return result

    @property
    def function(self) -> Any:
        """To stand in the place of `plain`, which may be a method with marks of torch's."""
        return functools.wraps(self.plain)(lambda *arguments, **more: self(*arguments, **more))


@pytest.fixture
def short(make_settings: MakeSettings, deep_model: Path) -> Callable[..., Settings]:
    def make(name: str, **changes: Any) -> Settings:
        values = {
            "pretrained_model_name_or_path": str(deep_model),
            "max_train_steps": 4,
            "checkpointing_steps": 2,
            "gradient_accumulation_steps": 2,
        }
        return make_settings(name, **{**values, **changes})

    return make


def in_updates(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fails: Fails) -> None:
    """Only in the updates of training, not in the trials before it."""
    plain, fails.on = Stepper._update, False

    def update(self: Stepper, step: int) -> None:
        fails.on = True
        try:
            plain(self, step)
        finally:
            fails.on = False

    monkeypatch.setattr(Stepper, "_update", update)
    monkeypatch.setattr(owner, name, fails.function)


@pytest.mark.parametrize("where", ["gradients", "state", "update"])
def test_it_is_done_again_to_the_same_bytes(
    short: Callable[..., Settings],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the making of the flat storage; half through the making of AdamW's state; and twice in an
    update after it has counted its step."""
    expected = train(short("expected", **FALLBACK)).lora.read_bytes()
    if where == "gradients":
        fails = Fails(optimizers.FlatLora, {1})
        monkeypatch.setattr(optimizers, "FlatLora", fails)
    elif where == "state":
        fails = Fails(torch.zeros_like, {2})
        plain = FlatLora.make_state

        def make_state(self: FlatLora, optimizer: Any) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "zeros_like", fails)
                plain(self, optimizer)

        monkeypatch.setattr(FlatLora, "make_state", make_state)
    else:
        fails = Fails(torch._fused_adamw_, {2, 3})
        in_updates(monkeypatch, torch, "_fused_adamw_", fails)
    capfd.readouterr()
    found = train(short("found", **FALLBACK)).lora.read_bytes()
    assert fails.struck == len(fails.at) and found == expected
    what = {
        "gradients": "the LoRA's gradients",
        "state": "the optimizer's state",
        "update": "the optimizer in step 2",
    }[where]
    lines = [line for line in capfd.readouterr().err.splitlines() if "out of GPU memory" in line]
    assert len(lines) == len(fails.at) and all(line.startswith(f"{what}: ") for line in lines)
    counts = [int(re.findall(r"and (\d) blocks on the device$", line)[0]) for line in lines]
    assert counts == sorted(set(counts), reverse=True), "each time fewer"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own, when imported
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"optimizer": "torch.optim.Adagrad"}, "torch.optim.Adagrad"),
        ({"optimizer_args": {"foreach": True}}, "torch.optim.AdamW"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigyopt.Prodigy"),
        ({"optimizer": "adamw8bit"}, "bitsandbytes.optim.AdamW8bit"),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else "",
)
def test_other_optimizers_do_their_first_update_again(
    short: Callable[..., Settings], changes: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where weights and state were changed. A later one ends in one line."""
    module, _, name = kind.rpartition(".")
    optimizer = getattr(pytest.importorskip(module), name)
    expected = train(short("expected", **FALLBACK, **changes)).lora.read_bytes()
    for at, end in (({1}, None), ({3}, "too small for the optimizer in step 3 ")):
        with monkeypatch.context() as patch:
            fails = Fails(optimizer.step, at, after=True)
            in_updates(patch, optimizer, "step", fails)
            settings = short(f"found-{min(at)}", **FALLBACK, **changes)
            if end is None:
                assert train(settings).lora.read_bytes() == expected
            else:
                with pytest.raises(QwenLoraError, match=end):
                    train(settings)
            assert fails.struck == 1


def test_one_line_that_says_what_fits(
    short: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `oom_fallback` at once; with it when no block is left on the device."""
    monkeypatch.setattr(FlatLora, "make_state", strike)
    with pytest.raises(QwenLoraError) as failed:
        train(short("ends", rank=8))
    line = str(failed.value)
    assert "\n" not in line
    assert re.fullmatch(
        r"the GPU's memory is too small for the optimizer's state with recompute none "
        r"\(`plan` predicts 0\.\d\d GiB for the weights and the LoRA alone\); "
        r"set blocks_on_device: \d(; or base_precision: (fp8|int8|nf4))*; or rank: 4\. "
        r"Checkpoints are intact",
        line,
    ), line
    with pytest.raises(QwenLoraError) as failed:
        train(short("falls-back", **FALLBACK))
    assert "with recompute full and 0 blocks on the device" in str(failed.value)
    assert "set blocks_on_device" not in str(failed.value)


def test_a_resumed_run_does_it_again(
    short: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """State that is loaded may not fit either."""
    expected = train(short("expected", **FALLBACK)).lora.read_bytes()
    settings = short("found", **FALLBACK)
    interrupt(settings, 2)
    fails = Fails(torch.optim.AdamW.load_state_dict, {1}, on=False)
    plain = assemble.restore

    def restore(*arguments: Any) -> None:
        fails.on = True
        plain(*arguments)

    monkeypatch.setattr(assemble, "restore", restore)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", fails.function)
    assert train(settings).lora.read_bytes() == expected
    assert fails.struck == 1


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_is_what_torch_makes(amsgrad: bool) -> None:
    """Before the first step: the same entries and bits as torch's own, and after it."""
    settings = Settings(optimizer_args={"amsgrad": amsgrad})
    states = []
    for early in (True, False):
        parameters = [("a", torch.nn.Parameter(torch.linspace(-1, 1, 96).view(4, 24)))]
        optimizer, flat = build_optimizer(parameters, settings)
        assert flat is not None and flat.weight.grad is not None
        if early:
            flat.make_state(optimizer)
            entries = [(key, value.dtype) for key, value in optimizer.state[flat.weight].items()]
        flat.weight.grad.copy_(flat.weight.detach().sin())
        optimizer.step()
        states.append(optimizer.state[flat.weight])
        assert entries == [(key, value.dtype) for key, value in states[-1].items()]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) and value.stride() == states[1][key].stride()
        assert value.requires_grad == states[1][key].requires_grad
