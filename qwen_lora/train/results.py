# ruff: noqa: TID253
"""The numbers that a step gives, on their way from the device.

Whoever reads a number waits for all that is queued on a GPU. So they are copied behind the step
into page-locked memory, and read when they are there or when somebody needs them all.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the step's samples on all ranks
    grad_norm: float  # before clipping

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Part:
    """One micro-batch of a step, for the message if something is wrong with it."""

    sample_ids: list[str]
    weight: float
    losses: torch.Tensor  # [B]


@dataclass(frozen=True)
class Done:
    """A step that is queued, or over."""

    step: int
    parts: list[Part]


class Results:
    """Of steps, oldest first. `put` and `take` in the same thread."""

    def __init__(self) -> None:
        self._awaited: deque[tuple[Done, torch.Tensor, Any]] = deque()

    def put(self, done: Done, values: torch.Tensor) -> None:
        """values: [2], loss and gradient norm."""
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._awaited.append((done, values, arrived))

    def look(self, wait: bool) -> tuple[Done, StepResult] | None:
        """The oldest that was not dropped, if it is there; wait: or once it is."""
        if not self._awaited:
            return None
        done, values, arrived = self._awaited[0]
        if arrived is not None:
            if wait:
                arrived.synchronize()
            elif not arrived.query():
                return None
        loss, norm = values.tolist()
        return done, StepResult(loss, norm)

    def drop(self) -> None:
        self._awaited.popleft()
