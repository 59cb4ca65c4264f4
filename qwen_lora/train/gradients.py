# ruff: noqa: TID253
"""The gradients of several ranks: one buffer, one all-reduce a step.

DDP would lay its buckets out anew after the first step, in the order in which gradients became
ready. Where a number stands in what is reduced decides in which order three or more ranks add it
up, so a resumed run would not have the bits of an unbroken one. Here the layout is that of the
parameters, always; only LoRA gradients travel, so there is little to hide behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_ALIGN = 32  # numbers: each parameter's gradient begins at a multiple of 128 bytes


class SharedGradients:
    """Makes every parameter's gradient a view of one float32 buffer; backward adds to it in place.

    parameters: float32, on one device, the same in the same order on every rank. Do not set their
    gradients to None afterwards.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        begins, end = [], _ALIGN  # in front: the loss
        for parameter in parameters:
            begins.append(end)
            end += -(-parameter.numel() // _ALIGN) * _ALIGN
        self._buffer = torch.zeros(end, device=parameters[0].device)
        for parameter, begin in zip(parameters, begins, strict=True):
            view = self._buffer[begin : begin + parameter.numel()]
            parameter.grad = view.view_as(parameter)

    def clear(self) -> None:
        self._buffer.zero_()

    def sum(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum the gradients over the ranks, and with them a float32 scalar, whose sum returns."""
        self._buffer[0] = loss
        dist.all_reduce(self._buffer)
        return self._buffer[0].clone()
