# ruff: noqa: TID253
"""A checkpoint's state put into the optimizer, the schedule and the scaler of a run."""

from __future__ import annotations

from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.train.checkpoint import Checkpoint
from qwen_lora.train.flat import FlatLora
from qwen_lora.train.optimizer import make_optimizer
from qwen_lora.train.optimizer_state import check_state_fits, unpack_optimizer
from qwen_lora.train.tree import unpack


def restore(
    optimizer: torch.optim.Optimizer,
    flat: FlatLora | None,
    scheduler: Any,
    scaler: torch.amp.GradScaler,
    parameters: list[tuple[str, torch.nn.Parameter]],
    resumed: Checkpoint,
    settings: Settings,
) -> None:
    """May be called again after memory ran out. Raises QwenLoraError for state of another kind."""
    saved, tensors, what = resumed.optimizer, resumed.optimizer_tensors, "optimizer"
    try:
        check_state_fits(lambda named: make_optimizer(named, settings), parameters, saved, tensors)
        unpack_optimizer(optimizer, parameters, saved, tensors, flat)
        what = "schedule"
        _check_like(scheduler.state_dict(), unpack(resumed.scheduler, {}))
        scheduler.load_state_dict(unpack(resumed.scheduler, {}))
        scaler.load_state_dict(unpack(resumed.scaler, {}))
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise QwenLoraError(
            f"the checkpoint's {what} state cannot be loaded: {type(error).__name__} {error}"
        ) from error


def _check_like(own: dict[str, Any], saved: Any) -> None:
    """A schedule takes whatever it is given, and would fail at a later step. Raises ValueError."""
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise ValueError("other entries than this version's")
    for name, value in own.items():
        if not _alike(value, saved[name]):
            raise ValueError(f"{name} is {saved[name]!r}")


def _alike(own: Any, saved: Any) -> bool:
    if isinstance(own, list) and isinstance(saved, list):
        return len(own) == len(saved) and all(map(_alike, own, saved))
    numbers = (int, float)
    return type(own) is type(saved) or (isinstance(own, numbers) and type(saved) in numbers)
