# ruff: noqa: TID253
"""The gradients of all parameters in one buffer: cleared at once, summed over ranks at once.

DDP would lay its buckets out anew after the first step, in the order in which gradients became
ready. Where a number stands in what is reduced decides in which order three or more ranks add it
up, so a resumed run would not have the bits of an unbroken one. Here the layout is that of the
parameters, always; only LoRA gradients travel, so there is little to hide behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_ALIGN = 32  # numbers: each parameter begins at a multiple of 128 bytes


def begins(parameters: Sequence[torch.nn.Parameter]) -> list[int]:
    """Where each parameter begins in a storage of all, and where the last one ends."""
    found = [0]
    for parameter in parameters:
        found.append(found[-1] + -(-parameter.numel() // _ALIGN) * _ALIGN)
    return found


class FlatGradients:
    """Makes every parameter's gradient a view of one float32 buffer; backward adds to it in place.

    parameters: float32, on one device, the same in the same order on every rank. Do not set their
    gradients to None afterwards.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        *places, end = begins(parameters)
        self._buffer = torch.zeros(_ALIGN + end, device=parameters[0].device)  # in front: the loss
        self.numbers = self._buffer[_ALIGN:]  # zeros between the gradients
        for parameter, begin in zip(parameters, places, strict=True):
            view = self.numbers[begin : begin + parameter.numel()]
            parameter.grad = view.view_as(parameter)

    def clear(self) -> None:
        self._buffer.zero_()

    def sum(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum the gradients over the ranks, and with them a float32 scalar, whose sum returns."""
        self._buffer[0] = loss
        dist.all_reduce(self._buffer)
        return self._buffer[0].clone()
