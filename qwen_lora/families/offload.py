# ruff: noqa: TID253
"""What checkpointed blocks keep, their inputs, in host memory until the backward pass.

In the forward pass a block's inputs leave for the host while it computes; in the backward pass they
come back one block ahead. Host memory is taken once and used again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from qwen_lora.families.host_memory import CUDA, copy, host_buffer, is_gpu

LARGE = 1 << 20  # bytes; of what is smaller, copies would take longer than they are worth


class ActivationOffload:
    """`keeping(block)` is around each block of a forward pass that is checkpointed or compiled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.Tensor] = []  # host buffers
        self._kept: dict[int, list[_Kept]] = {}  # by block, of the newest pass
        self._block = 0
        self._shared: frozenset[int] | None = None
        # Tensors on their way to the host, with the event of their arrival.
        self._leaving: list[tuple[torch.Tensor, Any]] = []
        self._stream = CUDA.Stream(device) if is_gpu(device) else None

    def begin(self) -> None:
        """A forward pass begins; what an earlier one has left is not needed."""
        self._forget_left()
        self._kept = {}

    def keeping(
        self, block: int, shared: frozenset[int] | None = None
    ) -> AbstractContextManager[Any]:
        """shared, for a compiled block: the storages that are not its own (weights, rotations);
        large tensors in all others leave. None, for a checkpointed one: its two inputs do."""
        self._forget_left()
        self._block, self._shared = block, shared
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @property
    def free_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._free)

    # ---- to the host and back --------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_contiguous() or not self._leaves(tensor):
            return tensor
        kept = _Kept(self, tensor, self._block)
        self._kept.setdefault(self._block, []).append(kept)
        arrived = None
        if self._stream is not None:
            self._stream.wait_stream(CUDA.current_stream(self.device))
            with CUDA.stream(self._stream):
                copy(kept.host(), tensor)
            arrived = CUDA.Event()
            arrived.record(self._stream)
        elif kept.buffer is not None:
            copy(kept.host(), tensor)
        self._leaving.append((tensor, arrived))
        return kept

    def _leaves(self, tensor: torch.Tensor) -> bool:
        if self._shared is None:
            return tensor.ndim == 3  # one of the two streams of tokens
        large = tensor.numel() * tensor.element_size() >= LARGE
        return large and tensor.untyped_storage().data_ptr() not in self._shared

    def _forget_left(self) -> None:
        """Memory of what has left may be used again once it is copied: the device waits for that,
        after the block's computing, and the host does not."""
        for _, arrived in self._leaving:
            if arrived is not None:
                CUDA.current_stream(self.device).wait_event(arrived)
        self._leaving = []

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Kept):
            return packed  # type: ignore[no-any-return]
        self._forget_left()
        self._fetch(packed)
        found, packed.fetched = packed.fetched, None
        assert found is not None
        if packed.arrived is not None:
            CUDA.current_stream(self.device).wait_event(packed.arrived)
        for kept in self._kept.get(packed.block - 1, ()):
            self._fetch(kept)
        return found

    def _fetch(self, kept: _Kept) -> None:
        """Begin to bring a tensor back, if that has not begun."""
        if kept.fetched is not None:
            return
        kept.fetched = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        if self._stream is not None:
            # Its memory may be in use by what is queued.
            self._stream.wait_stream(CUDA.current_stream(self.device))
            with CUDA.stream(self._stream):
                copy(kept.fetched, kept.host())
            kept.arrived = CUDA.Event()
            kept.arrived.record(self._stream)
        elif kept.buffer is not None:
            copy(kept.fetched, kept.host())

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
    """One tensor on the host, as autograd holds it."""

    def __init__(self, offload: ActivationOffload, like: torch.Tensor, block: int) -> None:
        self.shape, self.dtype, self.block = like.shape, like.dtype, block
        self.size = like.numel() * like.element_size()
        self.buffer = offload.take(self.size)
        self.fetched: torch.Tensor | None = None  # on the device
        self.arrived: Any = None  # the event when it is there
        self._offload = offload

    def host(self) -> torch.Tensor:
        assert self.buffer is not None
        return self.buffer[: self.size].view(self.dtype).view(self.shape)

    def __del__(self) -> None:
        if self.buffer is not None:
            self._offload.give_back(self.buffer)
