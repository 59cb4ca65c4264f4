# ruff: noqa: TID253
"""How fast bytes come from host memory to the GPU."""

from __future__ import annotations

import time

import torch

from qwen_lora.families.host_memory import host_buffer

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
