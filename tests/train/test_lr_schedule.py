"""Schedules against their formulas; resuming them; what is refused."""

import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import SchedulerType

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.train.lr_schedule import depends_on_max_steps, make_lr_scheduler
from qwen_lora.train.tree import pack, unpack

PEAK, STEPS, WARMUP = 1e-3, 20, 5
RULES = "1:4,0.1:10,0.01"


def ramp(after: Callable[[float], float]) -> Callable[[int], float]:
    """Linear warm-up, then a function of the progress through the other steps."""

    def factor(step: int) -> float:
        return step / WARMUP if step < WARMUP else after((step - WARMUP) / (STEPS - WARMUP))

    return factor


FACTORS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": ramp(lambda progress: 1.0),
    "linear": ramp(lambda progress: 1 - progress),
    "cosine": ramp(lambda progress: 0.5 * (1 + math.cos(math.pi * progress))),
    "cosine_with_restarts": ramp(
        lambda progress: (
            0.0 if progress == 1 else 0.5 * (1 + math.cos(math.pi * (3 * progress % 1)))
        )
    ),
    "polynomial": ramp(lambda progress: (1 - progress) ** 2 * (1 - 1e-7 / PEAK) + 1e-7 / PEAK),
    "piecewise_constant": lambda step: 1.0 if step < 4 else 0.1 if step < 10 else 0.01,
}


def settings_of(name: Any, **changes: Any) -> Settings:
    return Settings(
        lr_scheduler=name,
        learning_rate=PEAK,
        max_train_steps=STEPS,
        **{
            "lr_warmup_steps": WARMUP,
            "lr_num_cycles": 3,
            "lr_power": 2.0,
            "lr_step_rules": RULES,
            **changes,
        },
    )


def start(settings: Settings) -> tuple[torch.optim.Optimizer, Any]:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=settings.learning_rate)
    return optimizer, make_lr_scheduler(optimizer, settings)


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The rate that each of the next steps uses."""
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_every_schedule_of_diffusers_is_offered() -> None:
    offered = set(get_args(Settings.model_fields["lr_scheduler"].annotation))
    assert offered == {kind.value for kind in SchedulerType} == set(FACTORS)


@pytest.mark.parametrize("name", FACTORS)
def test_formulas(name: str) -> None:
    used = rates(*start(settings_of(name)), STEPS)
    assert used == pytest.approx([PEAK * FACTORS[name](step) for step in range(STEPS)], rel=1e-12)


@pytest.mark.parametrize("name", FACTORS)
def test_resuming_continues_to_the_last_bit(name: str) -> None:
    expected = rates(*start(settings_of(name)), STEPS)
    first, scheduler = start(settings_of(name))
    used = rates(first, scheduler, 7)
    state = json.loads(json.dumps(pack(scheduler.state_dict(), "s", {})))
    saved = first.state_dict()
    second, scheduler = start(settings_of(name))
    second.load_state_dict(saved)
    scheduler.load_state_dict(unpack(state, {}))
    assert used + rates(second, scheduler, STEPS - 7) == expected


@pytest.mark.parametrize("name", FACTORS)
def test_which_schedules_depend_on_the_length(name: str) -> None:
    """Whether the first steps differ in a longer run decides whether it may be made longer."""
    short, long = settings_of(name), settings_of(name, lr_warmup_steps=WARMUP)
    long = long.model_copy(update={"max_train_steps": 2 * STEPS})
    differ = rates(*start(short), STEPS) != rates(*start(long), STEPS)
    assert depends_on_max_steps(short) == depends_on_max_steps(long) == differ


@pytest.mark.parametrize(
    "rules", [None, "", "1:10", "1:10,x", "1:ten,0.1", "1:20,0.1:10,0.01", "1:2:3,1", "-1:10,1"]
)
def test_rules_that_cannot_be_read(rules: str | None) -> None:
    with pytest.raises(InputError, match="lr_step_rules .* such as 1:1000"):
        start(settings_of("piecewise_constant", lr_step_rules=rules))


def test_numbers_that_do_not_work() -> None:
    with pytest.raises(InputError, match="needs steps after its warm-up"):
        start(settings_of("polynomial", lr_warmup_steps=STEPS))
    low = settings_of("polynomial").model_copy(update={"learning_rate": 1e-8})
    with pytest.raises(InputError, match="lr_end"):
        start(low)
    unknown = Settings().model_copy(update={"lr_scheduler": "cosin"})
    with pytest.raises(InputError, match="'cosin'; known: linear, cosine,"):
        start(unknown)


def test_warm_up_as_long_as_the_run() -> None:
    for name in ("linear", "cosine", "constant_with_warmup"):
        used = rates(*start(settings_of(name, lr_warmup_steps=STEPS)), STEPS)
        assert used == pytest.approx([PEAK * step / STEPS for step in range(STEPS)])
