# ruff: noqa: TID253
"""All LoRA weights in the type that blocks compute in, cast at once when a pass begins.

A block would cast each of its LoRA's tensors by itself, cast each gradient back and add it to the
parameter's: some twenty kernels that take longer to launch than to run. Here the blocks' gradients
are put together and cast in one piece at the end of the backward pass. The numbers are the same:
each weight is used once in a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

CAST = "cast_weight"  # of a LoRA's Linear, while a pass runs


class LoraCast:
    """Kept as `transformer.lora_cast`, for a LoRA whose parameters are views of one tensor."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        weight: torch.nn.Parameter,
        parameters: Sequence[torch.nn.Parameter],
        begins: Sequence[int],
    ) -> None:
        """weight: [numbers], float32; parameters: its views, of which number i begins at
        `begins[i]`, all of them weights of Linears in `transformer`."""
        owners = {id(module.weight): module for module in transformer.modules()
                  if isinstance(module, torch.nn.Linear)}  # fmt: skip
        self._weight = weight
        self._modules = [owners[id(parameter)] for parameter in parameters]
        self._shapes = [parameter.shape for parameter in parameters]
        ends = [*begins[1:], len(weight)]
        # Each parameter and what stands behind it.
        self._sizes = [
            (shape.numel(), end - begin - shape.numel())
            for begin, end, shape in zip(begins, ends, self._shapes, strict=True)
        ]

    def begin(self, dtype: torch.dtype) -> torch.Tensor | None:
        """A pass begins: give each Linear its weight. Returns all of them, or None in float32,
        where blocks take the parameters themselves."""
        if dtype == self._weight.dtype:
            return None
        cast = self._weight.to(dtype)
        parts = torch.split(cast, [*chain.from_iterable(self._sizes)])[::2]
        for module, part, shape in zip(self._modules, parts, self._shapes, strict=True):
            module.__dict__[CAST] = part.view(shape)
        return cast


def cast_weight(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a LoRA's Linear in `dtype`."""
    found: torch.Tensor | None = getattr(linear, CAST, None)
    return linear.weight.to(dtype) if found is None or found.dtype != dtype else found
