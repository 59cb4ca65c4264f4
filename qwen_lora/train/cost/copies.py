# ruff: noqa: TID253
"""How fast bytes come from host memory to the GPU, and how long computing waits for them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from qwen_lora.families.base import among
from qwen_lora.families.host_memory import host_buffer
from qwen_lora.families.offload import COMPILED
from qwen_lora.families.streaming import RING, spread

SIZE = 1 << 28  # bytes of one copy
# Seconds by which a streamed block takes longer in each direction, even where its copy hides behind
# computing: launching kernels and copying share the processor and the bus. Half of the 1.1 ms that
# two H200 machines showed, one compiled and one not.
BESIDE_COPIES = 0.00055


def measure_copies(device: torch.device) -> float | None:
    """Bytes a second of copies to a GPU; None for a CPU, whose memory it is already."""
    if device.type != "cuda":
        return None
    host = host_buffer(SIZE, device)
    target = torch.empty(SIZE, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return SIZE / best


def copy_rate(copies: bool, h2d: float | None) -> float | None:
    """Bytes a second: as named, or measured on a GPU where something is copied."""
    if h2d is not None:
        return h2d * 1e9
    if not copies or not torch.cuda.is_available():
        return None
    return measure_copies(torch.device("cuda"))


@dataclass(frozen=True)
class Streamed:
    """Blocks whose weights come through a ring of buffers."""

    on_device: int  # blocks that stay
    copy: float  # seconds, of one block's weights
    longer: float = 0.0  # seconds that one of them computes longer in each direction


@dataclass(frozen=True)
class Offloaded:
    """Compiled blocks whose activations wait in host memory."""

    stay: int  # blocks whose do not leave, besides the last ones
    copy: float  # seconds, of one block's


def copying_seconds(
    blocks: int,
    forward: float,
    backward: float,
    streamed: Streamed | None = None,
    offloaded: Offloaded | None = None,
) -> float:
    """Of a forward and a backward pass that wait for copies, as `BlockStreamer` and
    `ActivationOffload` queue them: each begins when what it has to wait for is computed and the
    ones of its kind before it are over. forward, backward: seconds where nothing is copied."""
    run = _Run(blocks, streamed, offloaded)
    for block in range(blocks):
        run.enter(block, 1)
        run.let_go(block)
        run.compute(block, forward / blocks)
        run.send(block)
    for block in reversed(range(blocks)):
        run.enter(block, -1)
        run.come_back(block)
        run.compute(block, backward / blocks)
    return run.computed


class _Run:
    """The clocks of computing and of copies in both directions, in seconds."""

    def __init__(self, blocks: int, streamed: Streamed | None, offloaded: Offloaded | None) -> None:
        self.computed = self._to_host = 0.0
        self._to_device = Bus()
        self._weights = streamed.copy if streamed else 0.0
        self._longer = streamed.longer if streamed else 0.0
        self._streamed = spread(blocks, blocks - streamed.on_device) if streamed else []
        self._turns = {block: turn for turn, block in enumerate(self._streamed)}
        self._ready = dict.fromkeys(range(RING), 0.0)  # turn -> when its copy is over
        self._active: int | None = None
        self._activations = offloaded.copy if offloaded else 0.0
        others = max(0, blocks - COMPILED) if offloaded else 0
        stay = min(offloaded.stay, others) if offloaded else 0
        self._leaves = {block for block in range(others) if not among(block, stay, others)}
        self._left: dict[int, float] = {}  # block -> when its activations are in host memory
        self._back: dict[int, float] = {}

    def enter(self, block: int, direction: int) -> None:
        """A streamed block waits for its weights; whose block is over has its buffer refilled."""
        turn = self._turns.get(block)
        if self._active is not None and turn != self._active:
            ahead = self._active + direction * RING
            if 0 <= ahead < len(self._streamed):
                self._ready[ahead] = self._to_device.copy(0, self.computed, self._weights)
        if turn is not None:
            self.computed = max(self.computed, self._ready[turn])
        self._active = turn

    def compute(self, block: int, seconds: float) -> None:
        self.computed += seconds + (self._longer if block in self._turns else 0.0)

    def let_go(self, block: int) -> None:
        """A block begins when the activations of the third before it have left."""
        self.computed = max(self.computed, self._left.get(block - COMPILED, 0.0))

    def send(self, block: int) -> None:
        if block in self._leaves:
            self._to_host = max(self._to_host, self.computed) + self._activations
            self._left[block] = self._to_host

    def come_back(self, block: int) -> None:
        """They come two blocks ahead."""
        for earlier in range(block, max(-1, block - COMPILED), -1):
            if earlier in self._leaves and earlier not in self._back:
                copied = self._to_device.copy(1, self.computed, self._activations)
                self._back[earlier] = copied
            if earlier == block:
                self.computed = max(self.computed, self._back.get(block, 0.0))


class Bus:
    """Copies in one direction, of two queues that share its rate while both have some."""

    def __init__(self) -> None:
        self._over = [0.0, 0.0]  # when the last of each queue will be copied

    def copy(self, queue: int, now: float, seconds: float) -> float:
        """When a copy that is queued now, and takes so long alone, will be over."""
        begun = max(self._over[queue], now)
        shared = min(seconds, max(0.0, self._over[1 - queue] - begun))
        self._over[queue] = begun + seconds + shared
        self._over[1 - queue] += shared
        return self._over[queue]
