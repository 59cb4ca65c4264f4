# ruff: noqa: TID253
"""Learning-rate schedules: diffusers' own, one step of theirs per optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError

WITHOUT_END = {"constant", "constant_with_warmup", "piecewise_constant"}


def make_lr_scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> Any:
    """A torch LambdaLR over optimizer steps. Raises InputError for an unknown name or bad rules."""
    names = [kind.value for kind in SchedulerType]
    if settings.lr_scheduler not in names:
        raise InputError(
            f"unknown lr_scheduler {settings.lr_scheduler!r}; known: {', '.join(names)}"
        )
    if settings.lr_scheduler == "piecewise_constant" and not settings.lr_step_rules:
        raise InputError(
            "lr_scheduler piecewise_constant needs lr_step_rules, such as 1:10,0.1:20,0.01"
        )
    try:
        return get_scheduler(
            settings.lr_scheduler,
            optimizer,
            step_rules=settings.lr_step_rules,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
            num_cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
    except ValueError as error:
        raise InputError(f"lr_scheduler {settings.lr_scheduler}: {error}") from error


def depends_on_max_steps(settings: Settings) -> bool:
    """Whether another `max_train_steps` would have changed the steps already done."""
    return settings.lr_scheduler not in WITHOUT_END
