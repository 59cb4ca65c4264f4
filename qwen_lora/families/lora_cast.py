# ruff: noqa: TID253
"""LoRA weights in the type that blocks compute in, cast for several blocks at once when a pass
begins.

A block would cast each of its LoRA's tensors by itself, cast each gradient back and add it to the
parameter's: some twenty kernels that take longer to launch than to run. Here the gradients of a
segment are put together and added in one piece, as soon as the last one is there. The numbers are
the same: each weight is used once in a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

CAST = "cast_weight"  # of a LoRA's Linear, while a pass runs
SEGMENT = 1 << 22  # numbers, at least: what is held twice for a moment of the backward pass


class LoraCast:
    """Kept as `transformer.lora_cast`, for a LoRA whose parameters are views of one tensor."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        weight: torch.nn.Parameter,
        gradient: torch.Tensor,
        parameters: Sequence[torch.nn.Parameter],
        begins: Sequence[int],
    ) -> None:
        """weight: [numbers], float32; gradient: its own, to which backward passes add; parameters:
        views of `weight`, of which number i begins at `begins[i]`, all of them weights of Linears
        in `transformer`."""
        linears = [each for each in transformer.modules() if isinstance(each, torch.nn.Linear)]
        owners = {id(linear.weight): linear for linear in linears}
        self._weight, self._gradient = weight, gradient
        self._segments: list[list[_Place]] = [[]]
        for parameter, begin in zip(parameters, begins, strict=True):
            segment = self._segments[-1]
            if segment and begin - segment[0].begin >= SEGMENT:
                segment = []
                self._segments.append(segment)
            segment.append(_Place(owners[id(parameter)], begin, parameter.shape))

    def begin(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """A pass begins: give each Linear its weight. Returns one tensor of each storage that they
        are in; none in float32, where blocks take the parameters themselves."""
        if dtype == self._weight.dtype:
            return []
        firsts = []
        for places in self._segments:
            cast: tuple[torch.Tensor, ...] = _Cast.apply(
                self._weight, self._gradient, places, dtype
            )  # type: ignore[no-untyped-call]
            firsts.append(cast[0])
            for place, part in zip(places, cast, strict=True):
                place.linear.__dict__[CAST] = part
        return firsts


def cast_weight(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a LoRA's Linear in `dtype`."""
    found: torch.Tensor | None = getattr(linear, CAST, None)
    return linear.weight.to(dtype) if found is None or found.dtype != dtype else found


@dataclass(frozen=True)
class _Place:
    """One parameter."""

    linear: torch.nn.Linear
    begin: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.begin + self.shape.numel()


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        places: list[_Place],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, ...]:
        begin = places[0].begin
        cast = weight[begin : places[-1].end].to(dtype)
        ctx.gradient, ctx.places = gradient, places
        ctx.set_materialize_grads(False)
        return tuple(cast[p.begin - begin : p.end - begin].view(p.shape) for p in places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Adds to the gradient itself, as autograd does: nothing is returned for it."""
        places, parts, end = ctx.places, [], ctx.places[0].begin
        known = next(gradient for gradient in gradients if gradient is not None)
        for place, gradient in zip(places, gradients, strict=True):
            if place.begin > end:
                parts.append(known.new_zeros(place.begin - end))
            end = place.end
            whole = known.new_zeros(place.shape) if gradient is None else gradient
            parts.append(whole.reshape(-1))
        ctx.gradient[places[0].begin : end].add_(torch.cat(parts))
        return None, None, None, None
