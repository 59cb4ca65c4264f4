# ruff: noqa: TID253
"""A LoRA's several hundred small tensors as one for AdamW.

Each parameter and its gradient become views of one storage each. What updates number by number
comes to the same bits over all of them at once, in one kernel instead of hundreds. The parameters
stay what the model, autograd, checkpoints and exports see; a checkpoint holds the optimizer's state
by their names, as without this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qwen_lora.errors import QwenLoraError
from qwen_lora.families.lora_cast import LoraCast
from qwen_lora.train.gradients import FlatGradients, begins

# torch's fused AdamW on a CPU takes 16 numbers at a time and rounds what is left over differently.
_AT_ONCE = 16

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


class FlatLora:
    """Moves float32 parameters on one device into one storage. `weight` is all of them for an
    optimizer, and its gradient all of theirs; zeros stand between them and stay zeros."""

    def __init__(self, named: NamedParameters) -> None:
        self._parameters = parameters = [parameter for _, parameter in named]
        self.names = [name for name, _ in named]
        self._shapes = [parameter.shape for parameter in parameters]
        *self._begins, end = begins(parameters)
        self.weight = torch.nn.Parameter(torch.zeros(end, device=parameters[0].device))
        self.gradients = FlatGradients(parameters)
        self.weight.grad = self.gradients.numbers
        for number, parameter in enumerate(parameters):
            view = self._part(self.weight.detach(), number)
            view.copy_(parameter.detach())
            parameter.data = view

    def cast_together(self, transformer: Any) -> None:
        """For the family's own forward pass, of which these are the LoRA."""
        transformer.lora_cast = LoraCast(
            transformer, self.weight, self.gradients.numbers, self._parameters, self._begins
        )

    def make_state(self, optimizer: torch.optim.Optimizer) -> None:
        """What AdamW would make in its first step, before it: then no memory is asked for in the
        middle of a run. All of it or nothing."""
        (group,) = optimizer.param_groups
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        state = {"step": torch.zeros((), device=self.weight.device)}
        state |= {key: torch.zeros_like(self.weight) for key in keys}
        optimizer.state[self.weight] = state

    def split(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of an optimizer over `weight` as that of one over the parameters, which
        has no state before its first step. Copied to the host once, then views."""
        numbers = range(len(self.names))
        (group,) = state["param_groups"]
        host = {key: value.cpu() for key, value in state["state"].get(0, {}).items()}
        if host and not host["step"]:
            host = {}
        states = {
            number: {key: self._part(value, number) for key, value in host.items()}
            for number in numbers
        }
        groups = [{**group, "params": list(numbers)}]
        return {"state": states if host else {}, "param_groups": groups}

    def join(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse. Raises QwenLoraError where parameters have made different numbers of steps,
        KeyError where one has no state."""
        (group,) = state["param_groups"]
        states = state["state"]
        joined = {}
        for key, first in states[0].items() if states else ():
            every = [states[number][key] for number in range(len(self.names))]
            if first.ndim == 0:
                if any(value != first for value in every):
                    raise QwenLoraError(
                        f"the checkpoint's optimizer state has more than one {key}: the LoRA's "
                        "tensors are updated together"
                    )
                joined[key] = first
                continue
            joined[key] = torch.zeros(self.weight.shape, dtype=first.dtype)
            for number, value in enumerate(every):
                self._part(joined[key], number).copy_(value)
        groups = [{**group, "params": [0]}]
        return {"state": {0: joined} if joined else {}, "param_groups": groups}

    def _part(self, value: torch.Tensor, number: int) -> torch.Tensor:
        """Of one parameter; a count of steps is the same for all."""
        if value.ndim == 0:
            return value
        begin, shape = self._begins[number], self._shapes[number]
        return value[begin : begin + shape.numel()].view(shape)


def fits(optimizer: torch.optim.Optimizer, named: NamedParameters) -> bool:
    """Whether one tensor instead of many changes no bit of what `optimizer` does."""
    return (
        type(optimizer) is torch.optim.AdamW
        and all(group["fused"] for group in optimizer.param_groups)
        and all(parameter.numel() % _AT_ONCE == 0 for _, parameter in named)
    )
