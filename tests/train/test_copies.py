"""How long computing waits for streamed blocks and offloaded activations: the formulas against the
queues of the real classes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qwen_lora.families import offload
from qwen_lora.families.base import among
from qwen_lora.families.offload import COMPILED, ActivationOffload
from qwen_lora.families.streaming import BlockStreamer, spread
from qwen_lora.train.cost.copies import offloaded_seconds, streamed_seconds

CPU = torch.device("cpu")


class Clock(BlockStreamer):
    """Copies take time on a clock of their own, and begin when what is queued is computed."""

    def __init__(self, copy: float) -> None:
        super().__init__(CPU)
        self.copy, self.computed, self.copied = copy, 0.0, 0.0
        self.there: dict[int, float] = {}

    def _fetch(self, turn: int) -> None:
        if self._holds[self._buffer_of(turn)] != turn:
            self.copied = max(self.copied, self.computed) + self.copy
            self.there[turn] = self.copied
        super()._fetch(turn)

    def compute(self, block: int, seconds: float, backward: bool) -> None:
        self.enter(block, backward)
        if block in self:
            self.computed = max(self.computed, self.there[self._turns[block]])
        self.computed += seconds


def on_the_clock(
    blocks: int, on_device: int, forward: float, backward: float, copy: float
) -> float:
    """Of the second step; the first one begins with an empty ring."""
    streamer = Clock(copy)
    for index in spread(blocks, blocks - on_device):
        streamer.store(index, torch.nn.Linear(2, 2).requires_grad_(False))
    streamer.finish()
    begun = 0.0
    for _ in range(2):
        begun = streamer.computed = max(streamer.computed, streamer.copied)
        streamer.begin()
        for block in range(blocks):
            streamer.compute(block, forward / blocks, backward=False)
        for block in reversed(range(blocks)):
            streamer.compute(block, backward / blocks, backward=True)
    return streamer.computed - begun


def test_it_is_what_the_streamer_does(fault_seed: int) -> None:
    draw = random.Random(fault_seed)
    for _ in range(200):
        blocks = draw.randint(1, 20)
        on_device = draw.randint(0, blocks)
        times = [draw.uniform(0.1, 3) for _ in range(3)]
        found = streamed_seconds(blocks, on_device, *times)
        assert found == pytest.approx(on_the_clock(blocks, on_device, *times)), (
            blocks, on_device, times
        )  # fmt: skip


def test_the_two_ends() -> None:
    assert streamed_seconds(60, 60, 60, 120, 100) == 180
    assert streamed_seconds(60, 0, 60, 120, 0.5) == 180  # each copy hides behind a block
    # Nothing but copies, two less in each direction: the ring has them.
    assert streamed_seconds(60, 0, 0, 0, 1) == 2 * 58


class OffloadClock(ActivationOffload):
    """As above."""

    def __init__(self, copy: float, stay: set[int]) -> None:
        super().__init__(CPU, stay)
        self.copy, self.computed, self.copied = copy, 0.0, 0.0
        self.there: dict[int, float] = {}

    def _copy(self, block: Any, home: bool) -> None:
        self.copied = self.there[block.index] = max(self.copied, self.computed) + self.copy
        super()._copy(block, home)

    def _let_go(self, but: int) -> None:
        for block in list(self._leaving)[: max(0, len(self._leaving) - but)]:
            if not block.stays:
                self.computed = max(self.computed, self.there[block.index])
        super()._let_go(but)

    def compute(self, seconds: float) -> None:
        self.computed += seconds


class Tick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: int, clock: OffloadClock, *taken: float) -> Any:
        ctx.save_for_backward(x)
        ctx.index, ctx.clock, ctx.taken = index, clock, taken[1]
        clock.compute(taken[0])
        return x + 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (_,) = ctx.saved_tensors
        clock, block = ctx.clock, ctx.clock._blocks[ctx.index]
        if not block.stays:
            clock.computed = max(clock.computed, clock.there[ctx.index])
        clock.compute(ctx.taken)
        return gradient, None, None, None, None


def test_it_is_what_offloading_does(fault_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LARGE", 1)
    draw = random.Random(fault_seed)
    for _ in range(60):
        blocks, stay = draw.randint(1, 20), draw.randint(0, 20)
        forward, backward, copy = (draw.uniform(0.1, 3) for _ in range(3))
        others = max(0, blocks - COMPILED)
        some = {n for n in range(others) if among(n, min(stay, others), others)}
        clock = OffloadClock(copy / blocks, some | set(range(others, blocks)))
        clock.begin()
        x = torch.ones(1, 2, 2, requires_grad=True)
        for index in range(blocks):
            with clock.keeping(index, frozenset()):
                each = forward / blocks, backward / blocks
                x = Tick.apply(x, index, clock, *each)  # type: ignore[no-untyped-call]
        x.sum().backward()
        found = offloaded_seconds(blocks, stay, forward, backward, copy / blocks)
        assert found == pytest.approx(clock.computed), (blocks, stay, forward, backward, copy)
