"""How long computing waits for streamed blocks: the formula against the real streamer's queue."""

from __future__ import annotations

import random

import pytest
import torch

from qwen_lora.families.streaming import BlockStreamer, spread
from qwen_lora.train.cost.copies import streamed_seconds

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
