# ruff: noqa: TID253
"""An update of the optimizer that ran out of memory, taken back so that it can be done again.

With a LoRA's tensors as one, all memory is there before the first step, and torch's fused kernel
comes last: before it only the count of steps has changed. Most other optimizers make their state in
their first update, and may have changed some weights by then: of that one all is copied to the host
before. Later ones that fail stay failed; such copies in every step would cost more than they save.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from qwen_lora.train.flat import FlatLora
from qwen_lora.train.tree import pack, unpack


class Undo:
    """`parameters`: with gradients, updated by `optimizer`, one by one or by `flat`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        flat: FlatLora | None,
    ) -> None:
        self._optimizer, self._parameters, self._flat = optimizer, parameters, flat
        self._steps: torch.Tensor | None = None  # counted before
        self._first = True
        self._host: dict[str, torch.Tensor] = {}  # weights, gradients and state before
        self._state: Any = None

    def keep(self) -> bool:
        """Before an update; whether `back` can undo it."""
        if self._flat is not None:
            counted = self._optimizer.state[self._flat.weight]["step"]
            if self._steps is None:
                self._steps = torch.empty_like(counted)
            self._steps.copy_(counted)
            return True
        first, self._first = self._first, False
        self._host, self._state = {}, None
        if first:
            for number, tensor in enumerate(self._changed()):
                self._host[f"{number}"] = tensor.to("cpu", copy=True)
            self._state = pack(self._optimizer.state_dict(), "state", self._host)
        return first

    def back(self) -> None:
        """May be called again if it runs out of memory itself."""
        if self._flat is not None:
            assert self._steps is not None
            self._optimizer.state[self._flat.weight]["step"].copy_(self._steps)
            return
        for number, tensor in enumerate(self._changed()):
            tensor.copy_(self._host[f"{number}"])
        self._optimizer.state.clear()  # before the old one comes to the device
        self._optimizer.load_state_dict(copy.deepcopy(unpack(self._state, self._host)))

    def _changed(self) -> list[torch.Tensor]:
        trained = [(p.detach(), p.grad) for p in self._parameters]
        return [tensor for pair in trained for tensor in pair if tensor is not None]
