# ruff: noqa: TID253
"""What blocks keep for their backward pass, in host memory until then.

A checkpointed block's inputs leave for the host while it computes; what a compiled block keeps is
there when it has computed, and leaves during the next two. In the backward pass they come back one
block ahead. Host memory is taken once and used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import torch

from qwen_lora.families.host_memory import CUDA, copy, host_buffer, is_gpu

LARGE = 1 << 20  # bytes; of what is smaller, copies would take longer than they are worth
# Blocks whose tensors are on the device at a time in the forward pass: of checkpointed blocks the
# one that runs, of compiled ones also two before it.
CHECKPOINTED, COMPILED = 1, 3


class ActivationOffload:
    """`keeping(block)` is around each block of a forward pass that is checkpointed or compiled."""

    def __init__(self, device: torch.device, stay: Collection[int] = ()) -> None:
        """stay: blocks whose tensors do not leave."""
        self.device = device
        self._stay = frozenset(stay)
        self._free: list[torch.Tensor] = []  # host buffers
        self._kept: dict[int, list[_Kept]] = {}  # by block, of the newest pass
        self._block = 0
        self._shared: frozenset[int] | None = None
        self._leaving: deque[list[_Kept]] = deque()  # on their way to the host, by block
        self._stream = CUDA.Stream(device) if is_gpu(device) else None

    def begin(self) -> None:
        """A forward pass begins; what an earlier one has left is not needed."""
        self._let_go(0)
        self._kept = {}

    def keeping(
        self, block: int, shared: frozenset[int] | None = None
    ) -> AbstractContextManager[Any]:
        """shared, for a compiled block: the storages that are not its own (weights, rotations);
        large tensors in all others leave. None, for a checkpointed one: its two inputs do."""
        self._let_go((CHECKPOINTED if shared is None else COMPILED) - 1)
        self._leaving.append([])
        self._block, self._shared = block, shared
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @property
    def free_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._free)

    # ---- to the host and back --------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_contiguous() or not self._leaves(tensor):
            return tensor
        stays = self._block in self._stay
        kept = _Kept(self, tensor, self._block, None if stays else self.take(tensor.nbytes))
        self._kept.setdefault(self._block, []).append(kept)
        if stays:
            return kept
        self._leaving[-1].append(kept)
        if self._stream is not None:
            self._stream.wait_stream(CUDA.current_stream(self.device))
            with CUDA.stream(self._stream):
                copy(kept.host(), tensor)
            kept.arrived = CUDA.Event()
            kept.arrived.record(self._stream)
        elif kept.buffer is not None:
            copy(kept.host(), tensor)
        return kept

    def _leaves(self, tensor: torch.Tensor) -> bool:
        if self._shared is None:
            return tensor.ndim == 3  # one of the two streams of tokens
        return tensor.nbytes >= LARGE and tensor.untyped_storage().data_ptr() not in self._shared

    def _let_go(self, but: int) -> None:
        """Memory of what has left, but of so many blocks, may be used again once it is copied: the
        device waits for that, after the computing that is queued, and the host does not."""
        while len(self._leaving) > but:
            for kept in self._leaving.popleft():
                if kept.here is None:
                    continue  # used already
                if kept.arrived is not None:
                    CUDA.current_stream(self.device).wait_event(kept.arrived)
                kept.here, kept.left = None, True

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Kept):
            return packed  # type: ignore[no-any-return]
        self._fetch(packed)
        if packed.left and packed.arrived is not None:
            CUDA.current_stream(self.device).wait_event(packed.arrived)
        found, packed.here = packed.here, None
        assert found is not None
        for kept in self._kept.get(packed.block - 1, ()):
            self._fetch(kept)
        return found

    def _fetch(self, kept: _Kept) -> None:
        """Begin to bring a tensor back, if it is not here and that has not begun."""
        if kept.here is not None:
            return
        assert kept.left, "used twice, and its memory was given away before it had left"
        kept.here = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        if self._stream is not None:
            # Its memory may be in use by what is queued.
            self._stream.wait_stream(CUDA.current_stream(self.device))
            with CUDA.stream(self._stream):
                copy(kept.here, kept.host())
            kept.arrived = CUDA.Event()
            kept.arrived.record(self._stream)
        elif kept.buffer is not None:
            copy(kept.here, kept.host())

    # ---- host memory -----------------------------------------------------------------------

    def take(self, size: int) -> torch.Tensor | None:
        """The smallest free buffer that is large enough, or a new one in place of a smaller one.
        None on the meta device, where nothing has numbers."""
        if self.device.type == "meta":
            return None
        self._free.sort(key=len)
        for number, buffer in enumerate(self._free):
            if len(buffer) >= size:
                return self._free.pop(number)
        if self._free:
            self._free.pop()
        return host_buffer(size, self.device)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Copies into it queue up in one stream behind those out of it."""
        self._free.append(buffer)


class _Kept:
    """One tensor as autograd holds it. buffer: its host memory; None: it stays, or nothing has
    numbers."""

    def __init__(
        self, offload: ActivationOffload, tensor: torch.Tensor, block: int, buffer: Any
    ) -> None:
        self.shape, self.dtype, self.block = tensor.shape, tensor.dtype, block
        self.size = tensor.nbytes
        self.here: torch.Tensor | None = tensor  # on the device
        self.left = False  # the host has it for certain
        self.buffer: torch.Tensor | None = buffer
        self.arrived: Any = None  # the event of its newest copy
        self._offload = offload

    def host(self) -> torch.Tensor:
        assert self.buffer is not None
        return self.buffer[: self.size].view(self.dtype).view(self.shape)

    def __del__(self) -> None:
        if self.buffer is not None:
            self._offload.give_back(self.buffer)
