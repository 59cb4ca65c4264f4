# ruff: noqa: TID253
"""Blocks whose frozen weights lie in host memory and are copied to the device ahead of their use.

A few buffers on the device form a ring. The streamed blocks take turns: turn t always uses buffer
t mod R, so its weights are views that are made once, and only their content comes and goes. Nothing
is copied back, for nothing changes them. While one block computes, the next one's bytes arrive, in
the forward pass upwards, in the backward pass downwards.

A streamed block reads its weights again in the backward pass: as it is recomputed, so that what
autograd keeps of the forward pass refers to none of them; or, compiled, in a backward pass of its
own, for which autograd keeps views of the buffers, not what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from qwen_lora.families.base import among
from qwen_lora.families.host_memory import ALIGNED, CUDA, copy, host_buffer, is_gpu

RING = 2  # buffers: one in use, one that is filled
# Bytes of one copy: those of activations, which are waited for sooner, come between.
CHUNK = 1 << 26


def spread(blocks: int, streamed: int) -> list[int]:
    """Which of so many blocks are streamed: evenly, so that copying has time between them."""
    return [index for index in range(blocks) if among(index, streamed, blocks)]


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in its block's bytes. Aliases are all given the same view."""

    tensors: tuple[torch.Tensor, ...]
    begin: int
    size: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        flat = buffer[self.begin : self.begin + self.size].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class _Stored:
    """A block in host memory."""

    host: torch.Tensor  # [size] uint8
    places: list[_Place]


class BlockStreamer:
    """Holds streamed blocks and brings them to the device. `enter` is called in front of every
    block, streamed or not, in forward and in recomputation."""

    def __init__(self, device: torch.device, ring: int = RING) -> None:
        self.device = device
        self.copied_bytes = 0  # to the device, since the start
        self._ring = ring
        self._stored: dict[int, _Stored] = {}  # by the block's index
        self._order: list[int] = []  # block indexes, ascending; a position here is a turn
        self._turns: dict[int, int] = {}
        self._buffers: list[torch.Tensor] = []
        self._holds: list[int | None] = []  # the turn whose bytes a buffer has
        self._active: int | None = None  # the turn that may be computing
        self._stream = CUDA.Stream(device) if is_gpu(device) else None
        self._filled: list[Any] = []  # events

    def __contains__(self, block: int) -> bool:
        return block in self._turns

    @property
    def blocks(self) -> list[int]:
        return list(self._order)

    @property
    def host_bytes(self) -> int:
        return sum(stored.host.numel() for stored in self._stored.values())

    @property
    def device_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)

    # ---- filling ---------------------------------------------------------------------------

    def store(self, index: int, block: torch.nn.Module) -> None:
        """Move a block's frozen tensors to the host; call `finish` before it is used."""
        places = _lay_out(block)
        size = max((place.begin + place.size for place in places), default=0)
        host = host_buffer(size, self.device)
        for place in places:
            place.view(host).copy_(place.tensors[0])
            for tensor in place.tensors:
                tensor.data = tensor.data.new_empty(0)
        self._stored[index] = _Stored(host, places)

    def finish(self) -> None:
        """Make the ring for what is stored. Call it again after storing more."""
        if self._stream is not None:
            CUDA.synchronize(self.device)
        self._order = sorted(self._stored)
        self._turns = {block: turn for turn, block in enumerate(self._order)}
        size = max((stored.host.numel() for stored in self._stored.values()), default=0)
        count = min(self._ring, len(self._order))
        if count > len(self._buffers) or any(size > buffer.numel() for buffer in self._buffers):
            for place in self._places():
                for tensor in place.tensors:
                    tensor.data = tensor.data.new_empty(0)
            self._buffers = []  # before the new ones are there
            self._buffers = [
                torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(count)
            ]
        self._holds, self._active = [None] * len(self._buffers), None
        if self._stream is not None:
            self._filled = [CUDA.Event() for _ in self._buffers]
        for turn, block in enumerate(self._order):
            for place in self._stored[block].places:
                view = place.view(self._buffers[self._buffer_of(turn)])
                for tensor in place.tensors:
                    tensor.data = view

    def _places(self) -> Iterable[_Place]:
        return chain.from_iterable(stored.places for stored in self._stored.values())

    # ---- passes ----------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward pass begins: fetch the first blocks."""
        self._active = None
        for turn in range(len(self._buffers)):
            self._fetch(turn)

    def enter(self, block: int, backward: bool = False) -> None:
        """All that is queued from now on may use this block's weights, and no longer those of the
        one that was entered before."""
        turn = self._turns.get(block)
        if self._active is not None and turn != self._active:
            self._leave(self._active, backward)
        if turn is not None:
            self._fetch(turn)
            if self._stream is not None:
                compute = CUDA.current_stream(self.device)
                compute.wait_event(self._filled[self._buffer_of(turn)])
        self._active = turn

    def reentering(self, block: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, for one use in checkpointing: its second call is the backward pass's."""
        calls = 0

        def entered(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                with _disable_current_modes():
                    # Selective recomputation watches every operator; copies are none of its own.
                    self.enter(block, backward=True)
            return run(*args)

        return entered

    def entering(self, block: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, of a block that is not recomputed: its backward pass begins with one of its
        outputs, and is over before an earlier block's begins."""

        def entered(*args: Any) -> Any:
            outputs = run(*args)
            others = {arg.grad_fn for arg in args if isinstance(arg, torch.Tensor)}
            for node in {output.grad_fn for output in outputs} - others - {None}:
                node.register_prehook(lambda _: self.enter(block, backward=True))
            return outputs

        return entered

    def _leave(self, turn: int, backward: bool) -> None:
        """Its buffer is free: fetch the one that comes into it next."""
        ahead = turn - len(self._buffers) if backward else turn + len(self._buffers)
        if 0 <= ahead < len(self._order):
            self._fetch(ahead)

    def _fetch(self, turn: int) -> None:
        """Copy a block into its buffer, if it is not there, after all that is queued already."""
        number = self._buffer_of(turn)
        if self._holds[number] == turn:
            return
        host = self._stored[self._order[turn]].host
        buffer = self._buffers[number][: host.numel()]
        if self._stream is None:
            copy(buffer, host)
        else:
            self._stream.wait_stream(CUDA.current_stream(self.device))
            parts = (torch.split(whole, CHUNK) for whole in (buffer, host))
            with CUDA.stream(self._stream):
                for target, source in zip(*parts, strict=True):
                    copy(target, source)
                self._filled[number].record(self._stream)
        self._holds[number] = turn
        self.copied_bytes += host.numel()

    def _buffer_of(self, turn: int) -> int:
        return turn % len(self._buffers)


def stream_more(streamer: BlockStreamer, blocks: Sequence[torch.nn.Module], on_device: int) -> None:
    """Leave only so many of a model's blocks on the device; the streamed ones stay streamed."""
    resident = [index for index in range(len(blocks)) if index not in streamer]
    for position in spread(len(resident), max(0, len(resident) - on_device)):
        streamer.store(resident[position], blocks[resident[position]])
    streamer.finish()


def _lay_out(block: torch.nn.Module) -> list[_Place]:
    places, begin = [], 0
    for tensors in _frozen(block):
        first = tensors[0]
        size = first.numel() * first.element_size()
        stride = torch.empty_like(first, device="meta").stride()  # its own, without gaps
        places.append(_Place(tensors, begin, size, first.dtype, first.shape, stride))
        begin += -(-size // ALIGNED) * ALIGNED
    return places


def _frozen(block: torch.nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """What does not train, each piece of memory once, with all tensors that name it."""
    found: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
    for name, tensor in chain(block.named_parameters(), block.named_buffers()):
        if tensor.requires_grad or ".lora_" in name:
            continue
        for one in (tensor, *_beside(tensor)):
            if one.numel():
                found.setdefault((one.data_ptr(), one.dtype), []).append(one)
    return [tuple(tensors) for tensors in found.values()]


def _beside(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What bitsandbytes' 4-bit weights hold besides their numbers: the scales of blocks, which are
    8-bit numbers themselves, and the scales of those."""
    state = getattr(tensor, "quant_state", None)
    found = []
    while state is not None:
        found.append(state.absmax)
        state = state.state2
    return found
