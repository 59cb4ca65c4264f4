"""Learning-rate schedules: diffusers' own, one step of theirs per optimizer step.

The rate is a pure function of the step's number, so a resumed run needs that number alone. Imports
no torch until a schedule is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

WITHOUT_END = {"constant", "constant_with_warmup", "piecewise_constant"}


def make_lr_scheduler(optimizer: Optimizer, settings: Settings) -> LambdaLR:
    """diffusers' schedule, to be stepped once per optimizer step, never per process.

    Raises InputError for an unknown name, rules that cannot be read, and numbers that the schedule
    cannot work with.
    """
    from diffusers.optimization import SchedulerType, get_scheduler

    name, warmup = settings.lr_scheduler, settings.lr_warmup_steps
    names = [kind.value for kind in SchedulerType]
    if name not in names:
        raise InputError(f"unknown lr_scheduler {name!r}; known: {', '.join(names)}")
    if name == "piecewise_constant":
        _check_rules(settings.lr_step_rules)
    if name == "polynomial" and warmup >= settings.max_train_steps:
        raise InputError(
            f"lr_scheduler polynomial needs steps after its warm-up: lr_warmup_steps is {warmup}, "
            f"max_train_steps {settings.max_train_steps}"
        )
    try:
        schedule: LambdaLR = get_scheduler(
            name,
            optimizer,
            step_rules=settings.lr_step_rules,
            num_warmup_steps=warmup,
            num_training_steps=settings.max_train_steps,
            num_cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
    except ValueError as error:  # polynomial: a learning rate below its end value
        raise InputError(f"lr_scheduler {name}: {error}") from error
    return schedule


def depends_on_max_steps(settings: Settings) -> bool:
    """Whether another `max_train_steps` would have changed the steps already done."""
    return settings.lr_scheduler not in WITHOUT_END


def _check_rules(rules: str | None) -> None:
    """`factor:until_step,...,factor`, as diffusers reads it; steps must rise."""
    parts = (rules or "").split(",")
    try:
        pairs = [part.split(":") for part in parts[:-1]]
        steps = [int(step) for _, step in pairs]
        factors = [float(factor) for factor, _ in pairs] + [float(parts[-1])]
    except ValueError:
        steps, factors = [], []
    if not factors or min(factors) < 0 or steps != sorted(set(steps)):
        raise InputError(
            f"lr_step_rules {rules!r} cannot be read; lr_scheduler piecewise_constant needs "
            "factor:step pairs with rising steps and a last factor, such as 1:1000,0.1:2000,0.01"
        )
