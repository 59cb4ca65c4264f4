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
from qwen_lora.train.cost.copies import Bus, Offloaded, Streamed, copying_seconds

CPU = torch.device("cpu")


class Times:
    """Copies take time on clocks of their own, and begin when what is queued is computed."""

    def __init__(self) -> None:
        self.computed = self.to_host = 0.0
        self.to_device = Bus()


class Clock(BlockStreamer):
    def __init__(self, copy: float, times: Times) -> None:
        super().__init__(CPU)
        self.copy, self.times = copy, times
        self.there: dict[int, float] = {}

    def _fetch(self, turn: int) -> None:
        if self._holds[self._buffer_of(turn)] != turn:
            times = self.times
            self.there[turn] = times.to_device.copy(0, times.computed, self.copy)
        super()._fetch(turn)

    def enter(self, block: int, backward: bool = False) -> None:
        super().enter(block, backward)
        if block in self:
            self.times.computed = max(self.times.computed, self.there[self._turns[block]])


def on_the_clock(
    blocks: int, on_device: int, forward: float, backward: float, copy: float
) -> float:
    """Of the second step; the first one begins with an empty ring."""
    times = Times()
    streamer = streaming(blocks, on_device, copy, times)
    begun = 0.0
    for _ in range(2):
        begun = times.computed = max(times.computed, times.to_device.copy(0, 0, 0))
        streamer.begin()
        for block in range(blocks):
            streamer.enter(block)
            times.computed += forward / blocks
        for block in reversed(range(blocks)):
            streamer.enter(block, backward=True)
            times.computed += backward / blocks
    return times.computed - begun


def streaming(blocks: int, on_device: int, copy: float, times: Times) -> Clock:
    streamer = Clock(copy, times)
    for index in spread(blocks, blocks - on_device):
        streamer.store(index, torch.nn.Linear(2, 2).requires_grad_(False))
    streamer.finish()
    return streamer


def test_it_is_what_the_streamer_does(fault_seed: int) -> None:
    draw = random.Random(fault_seed)
    for _ in range(200):
        blocks = draw.randint(1, 20)
        on_device = draw.randint(0, blocks)
        forward, backward, copy = (draw.uniform(0.1, 3) for _ in range(3))
        found = copying_seconds(blocks, forward, backward, Streamed(on_device, copy))
        expected = on_the_clock(blocks, on_device, forward, backward, copy)
        assert found == pytest.approx(expected), (blocks, on_device, forward, backward, copy)


def test_the_two_ends() -> None:
    assert copying_seconds(60, 60, 120, Streamed(60, 100)) == 180
    assert copying_seconds(60, 60, 120, Streamed(0, 0.5)) == 180  # each hides behind a block
    assert copying_seconds(60, 60, 120, Streamed(40, 0.5, longer=0.25)) == 180 + 2 * 20 * 0.25
    # Nothing but copies, two less in each direction: the ring has them.
    assert copying_seconds(60, 0, 0, Streamed(0, 1)) == 2 * 58


def test_two_queues_share_the_bus() -> None:
    bus = Bus()
    assert bus.copy(0, 0, 8) == 8
    assert bus.copy(1, 2, 3) == 8  # at half the rate
    assert bus.copy(0, 0, 1) == 12  # the other one's three seconds later
    assert bus.copy(1, 20, 1) == 21


class OffloadClock(ActivationOffload):
    """As above."""

    def __init__(self, copy: float, stay: set[int], times: Times) -> None:
        super().__init__(CPU, stay)
        self.copy, self.times = copy, times
        self.there: dict[int, float] = {}

    def _copy(self, block: Any, home: bool) -> None:
        times = self.times
        if home:
            over = times.to_device.copy(1, times.computed, self.copy)
        else:
            over = times.to_host = max(times.to_host, times.computed) + self.copy
        self.there[block.index] = over
        super()._copy(block, home)

    def _let_go(self, but: int) -> None:
        for block in list(self._leaving)[: max(0, len(self._leaving) - but)]:
            if not block.stays:
                self.times.computed = max(self.times.computed, self.there[block.index])
        super()._let_go(but)


class Tick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: int, clock: OffloadClock, *taken: float) -> Any:
        ctx.save_for_backward(x)
        ctx.index, ctx.clock, ctx.taken = index, clock, taken[1]
        clock.times.computed += taken[0]
        return x + 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (_,) = ctx.saved_tensors
        clock, block = ctx.clock, ctx.clock._blocks[ctx.index]
        if not block.stays:
            clock.times.computed = max(clock.times.computed, clock.there[ctx.index])
        clock.times.computed += ctx.taken
        return gradient, None, None, None, None


@pytest.mark.parametrize("streamed", [False, True])
def test_it_is_what_offloading_does(
    fault_seed: int, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Also while weights come over the same bus."""
    monkeypatch.setattr(offload, "LARGE", 1)
    draw = random.Random(fault_seed)
    for _ in range(60):
        blocks, stay = draw.randint(1, 20), draw.randint(0, 20)
        forward, backward, copy, weights = (draw.uniform(0.1, 3) for _ in range(4))
        on_device = draw.randint(0, blocks) if streamed else blocks
        others = max(0, blocks - COMPILED)
        some = {n for n in range(others) if among(n, min(stay, others), others)}
        times = Times()
        clock = OffloadClock(copy / blocks, some | set(range(others, blocks)), times)
        streamer = streaming(blocks, on_device, weights / blocks, times)
        streamer.begin()
        times.to_device = Bus()  # they were there from the step before
        streamer.there = dict.fromkeys(streamer.there, 0.0)
        clock.begin()
        x = torch.ones(1, 2, 2, requires_grad=True)
        for index in range(blocks):
            streamer.enter(index)
            with clock.keeping(index, frozenset()):
                each = forward / blocks, backward / blocks
                rest = (index, clock, *each)
                (x,) = streamer.entering(index, lambda x, rest: (Tick.apply(x, *rest),))(x, rest)
        x.sum().backward()
        found = copying_seconds(
            blocks,
            forward,
            backward,
            Streamed(on_device, weights / blocks),
            Offloaded(stay, copy / blocks),
        )
        facts = (blocks, stay, on_device, forward, backward, copy, weights)
        assert found == pytest.approx(times.computed), facts
