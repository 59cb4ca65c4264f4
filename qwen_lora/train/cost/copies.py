# ruff: noqa: TID253
"""How fast bytes come from host memory to the GPU, and how long computing waits for them."""

from __future__ import annotations

import time

import torch

from qwen_lora.families.base import among
from qwen_lora.families.host_memory import host_buffer
from qwen_lora.families.offload import COMPILED
from qwen_lora.families.streaming import RING, spread

SIZE = 1 << 28  # bytes of one copy


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


def copy_rate(traffic: int, h2d: float | None) -> float | None:
    """Bytes a second: as named, or measured on a GPU where something is copied."""
    if h2d is not None:
        return h2d * 1e9
    if not traffic or not torch.cuda.is_available():
        return None
    return measure_copies(torch.device("cuda"))


def streamed_seconds(
    blocks: int, on_device: int, forward: float, backward: float, copy: float
) -> float:
    """Of a forward and a backward pass in which streamed blocks' weights come through a ring of
    buffers, as `BlockStreamer` queues their copies: one behind the other, each as soon as the block
    that had its buffer is computed. forward, backward: seconds of the passes where nothing is
    copied; copy: of one block's weights."""
    streamed = spread(blocks, blocks - on_device)
    turns = {block: turn for turn, block in enumerate(streamed)}
    there = dict.fromkeys(range(RING), 0.0)  # turn -> when its copy is over
    computed = copied = 0.0
    active: int | None = None
    for direction, order, seconds in (
        (1, range(blocks), forward),
        (-1, reversed(range(blocks)), backward),
    ):
        for block in order:
            turn = turns.get(block)
            if active is not None and turn != active:
                ahead = active + direction * RING
                if 0 <= ahead < len(streamed):
                    copied = max(copied, computed) + copy
                    there[ahead] = copied
            if turn is not None:
                computed = max(computed, there[turn])
            computed += seconds / blocks
            active = turn
    return computed


def offloaded_seconds(
    blocks: int, stay: int, forward: float, backward: float, copy: float
) -> float:
    """Of a forward and a backward pass in which compiled blocks' activations wait in host memory,
    but those of `stay` blocks and of the last ones. As `ActivationOffload` has it a block begins
    when those of the third block before it have left; in the backward pass they come back one
    block ahead. forward, backward: seconds where nothing is copied; copy: of one block's."""
    others = max(0, blocks - COMPILED)
    stay = min(stay, others)
    leaves = [index < others and not among(index, stay, others) for index in range(blocks)]
    left = [0.0] * blocks
    computed = copied = 0.0
    for block in range(blocks):
        if block >= COMPILED and leaves[block - COMPILED]:
            computed = max(computed, left[block - COMPILED])
        computed += forward / blocks
        if leaves[block]:
            copied = left[block] = max(copied, computed) + copy
    there = [0.0] * blocks
    for block in reversed(range(blocks)):
        computed = max(computed, there[block])
        if block and leaves[block - 1]:
            copied = there[block - 1] = max(copied, computed) + copy
        computed += backward / blocks
    return computed
