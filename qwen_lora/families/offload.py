# ruff: noqa: TID253
"""What blocks keep for their backward pass, in host memory until then.

A checkpointed block's inputs leave for the host while it computes; what a compiled block keeps is
there when it has computed, and leaves during the next two. In the backward pass they come back one
block ahead, and of compiled ones two. Host memory is taken once and used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
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
        self._free: dict[int, list[torch.Tensor]] = {}  # host buffers by their size
        self._blocks: dict[int, _Block] = {}  # of the newest pass
        self._leaving: deque[_Block] = deque()  # on their way to the host
        self._now = _Block(0)
        self._shared: frozenset[int] | None = None
        self._stream = CUDA.Stream(device) if is_gpu(device) else None

    def begin(self) -> None:
        """A forward pass begins; what an earlier one has left is not needed."""
        self._let_go(0)
        for block in self._blocks.values():
            block.kept.clear()  # each refers to its block
        self._blocks = {}

    @contextmanager
    def keeping(self, block: int, shared: frozenset[int] | None = None) -> Iterator[None]:
        """shared, for a compiled block: the storages that are not its own (weights, rotations);
        large tensors in all others leave. None, for a checkpointed one: its two inputs do."""
        self._let_go((CHECKPOINTED if shared is None else COMPILED) - 1)
        self._now = self._blocks[block] = _Block(block, stays=block in self._stay)
        self._shared = shared
        there = None if self._stream is None else CUDA.Event()
        if there is not None:
            there.record(CUDA.current_stream(self.device))  # a checkpointed block's inputs
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        if not self._now.stays:
            self._send(self._now, there)
        self._leaving.append(self._now)

    @property
    def free_bytes(self) -> int:
        return sum(size * len(buffers) for size, buffers in self._free.items())

    # ---- to the host and back --------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not self._leaves(tensor) or not _dense(tensor):
            return tensor
        kept = _Kept(self, tensor, self._now)
        self._now.kept.append(kept)
        return kept

    def _leaves(self, tensor: torch.Tensor) -> bool:
        if self._shared is None:
            return tensor.ndim == 3  # one of the two streams of tokens
        return tensor.nbytes >= LARGE and tensor.untyped_storage().data_ptr() not in self._shared

    def _send(self, block: _Block, there: Any) -> None:
        """To the host: a checkpointed block's as soon as it begins, a compiled one's at its end."""
        if self._stream is not None:
            if self._shared is None:
                self._stream.wait_event(there)
            else:
                self._stream.wait_stream(CUDA.current_stream(self.device))
        self._copy(block, home=False)

    def _let_go(self, but: int) -> None:
        """Memory of what has left, but of so many blocks, may be used again once it is copied: the
        device waits for that, after the computing that is queued, and the host does not."""
        while len(self._leaving) > but:
            block = self._leaving.popleft()
            if block.stays:
                continue
            if block.arrived is not None:
                CUDA.current_stream(self.device).wait_event(block.arrived)
            block.left = True
            for kept in block.kept:
                kept.here = None

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Kept):
            return packed  # type: ignore[no-any-return]
        block = packed.block
        self._fetch(block)
        if block.coming:
            block.coming = False
            if block.arrived is not None:
                CUDA.current_stream(self.device).wait_event(block.arrived)
        found, packed.here = packed.here, None
        assert found is not None, "used twice, and its memory was given away"
        for ahead in range(1, 2 if self._shared is None else COMPILED):
            if (earlier := self._blocks.get(block.index - ahead)) is not None:
                self._fetch(earlier)
        return found

    def _fetch(self, block: _Block) -> None:
        """Begin to bring a block's tensors back, if they have left and that has not begun."""
        if not block.left:
            return
        block.left, block.coming = False, True
        for kept in block.kept:
            kept.here = torch.empty_strided(
                kept.shape, kept.stride, dtype=kept.dtype, device=self.device
            )
        if self._stream is not None:
            # Their memory may be in use by what is queued.
            self._stream.wait_stream(CUDA.current_stream(self.device))
        self._copy(block, home=True)

    def _copy(self, block: _Block, home: bool) -> None:
        """home: to the device."""
        with nullcontext() if self._stream is None else CUDA.stream(self._stream):
            for kept in block.kept:
                if kept.here is not None and (host := kept.host()) is not None:
                    copy(*((kept.here, host) if home else (host, kept.here)))
            if self._stream is not None:
                block.arrived = CUDA.Event()
                block.arrived.record(self._stream)

    # ---- host memory -----------------------------------------------------------------------

    def take(self, size: int) -> torch.Tensor | None:
        """The smallest free buffer that is large enough, or a new one in place of a smaller one.
        None on the meta device, where nothing has numbers."""
        if self.device.type == "meta":
            return None
        sizes = [known for known, buffers in self._free.items() if buffers]
        large = [known for known in sizes if known >= size]
        if large:
            return self._free[min(large)].pop()
        if sizes:
            self._free[max(sizes)].pop()
        return host_buffer(size, self.device)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Copies into it queue up in one stream behind those out of it."""
        self._free.setdefault(len(buffer), []).append(buffer)


class _Block:
    """What one block keeps."""

    def __init__(self, index: int, stays: bool = False) -> None:
        self.index, self.stays = index, stays
        self.kept: list[_Kept] = []
        self.left = False  # the host has it for certain, the device no longer
        self.coming = False  # back, and not waited for
        self.arrived: Any = None  # the event of its newest copies


class _Kept:
    """One tensor as autograd holds it."""

    def __init__(self, offload: ActivationOffload, tensor: torch.Tensor, block: _Block) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.block = block
        self.size = tensor.nbytes
        self.here: torch.Tensor | None = tensor  # on the device
        self.buffer = None if block.stays else offload.take(self.size)
        self._offload = offload

    def host(self) -> torch.Tensor | None:
        if self.buffer is None:
            return None
        return self.buffer[: self.size].view(self.dtype).as_strided(self.shape, self.stride)

    def __del__(self) -> None:
        if self.buffer is not None:
            self._offload.give_back(self.buffer)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its numbers fill its memory without gaps, in whatever order: heads before tokens."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
