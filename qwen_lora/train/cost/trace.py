# ruff: noqa: TID253
"""A forward and backward pass without memory: on the meta device tensors have shapes, types and
lifetimes, but no numbers.

What runs is the code that trains, so nothing here has to be kept in step with it: storages are
counted when an operator makes them and when the last reference to them goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

# torch's counter does not know the product of 8-bit integers.
_flops = {torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm], **flop_registry}
_LOW = {torch.ops.aten._int_mm, torch.ops.aten._scaled_mm}  # products in 8 bits


@dataclass(frozen=True)
class Traced:
    """Bytes besides what was there before; FLOPs as torch's own counter counts them."""

    kept: int  # at the end of the forward pass, for the backward pass
    peak: int
    forward_flops: int
    backward_flops: int  # recomputation included
    forward_low: int  # of them, in products in 8 bits
    backward_low: int

    def plus(self, more: Traced, less: Traced, times: float = 1) -> Traced:
        """With so many times what `more` has beyond `less`."""
        return Traced(
            *(
                getattr(self, name) + round(times * (getattr(more, name) - getattr(less, name)))
                for name in (field.name for field in fields(Traced))
            )
        )


def trace(forward: Callable[[], torch.Tensor], device: str = "meta", warm: bool = False) -> Traced:
    """Run `forward`, which returns losses, and the backward pass of their sum. warm: it has run
    before, with images of this size."""
    if not warm:
        with flash_attention(), torch.no_grad():
            forward()  # what is made once and kept (rotations) belongs to no step
    with flash_attention(), Live(device) as live:
        losses = forward()
        kept, flops, low = live.bytes, live.flops, live.low_flops
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return Traced(kept, live.peak, flops, live.flops - flops, low, live.low_flops - low)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of storages that operators make on one kind of device, and FLOPs."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.flops = self.low_flops = 0
        self._device = device
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in self._storages((args, kwargs)):
            self._watch(storage, 0)  # it was there before: a weight
        out = func(*args, **kwargs)
        for storage in self._storages(out):
            self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        if (count := _flops.get(func.overloadpacket)) is not None:
            flops = count(*args, **kwargs, out_val=out)
            self.flops += flops
            self.low_flops += flops if func.overloadpacket in _LOW else 0
        return out

    def _storages(self, values: Any) -> list[torch.UntypedStorage]:
        return [
            value.untyped_storage()
            for value in tree_iter(values)
            if isinstance(value, torch.Tensor) and value.device.type == self._device
        ]

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size


@contextmanager
def flash_attention() -> Iterator[None]:
    """On the meta device torch would choose the attention that writes out all scores; GPUs run one
    that keeps its inputs, its output and one number a row."""
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **options: Any
    ) -> torch.Tensor:
        if not query.is_meta:
            return cast(torch.Tensor, original(query, key, value, *others, **options))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return cast(torch.Tensor, flash(query, key, value, 0.0, False, False)[0])

    # Not a TorchFunctionMode: torch leaves those while it runs the backward pass.
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
