# ruff: noqa: TID253
"""Which of torch's attention kernels a GPU is fastest with: measured at the start of a run, since
it differs from card to card (cuDNN's is twice as fast as flash on one and slower on another).

The choice is kept in the checkpoints: a resumed run uses the kernel it began with, and its bits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qwen_lora.errors import InputError

# name -> how torch.backends.cuda switches it
KERNELS: Mapping[str, Callable[[bool], None]] = {
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
}
REPEATS = 5

Measure = Callable[[str], float]  # seconds of a kernel; RuntimeError when it cannot do it


def choose_attention(wanted: str, device: torch.device, measure: Measure) -> str | None:
    """The kernel to use on a GPU; None: torch's own choice, always on a CPU.

    wanted: auto measures all that can do it, torch measures none, otherwise a kernel's name.
    Raises InputError for a kernel that this GPU cannot run.
    """
    if device.type != "cuda" or wanted == "torch":
        return None
    taken: dict[str, float] = {}
    for name in KERNELS if wanted == "auto" else (wanted,):
        try:
            taken[name] = measure(name)
        except RuntimeError as error:
            if wanted != "auto":
                raise InputError(f"attention {name} does not run on this GPU: {error}") from error
    return min(taken, key=lambda name: taken[name]) if taken else None


def use_attention(name: str | None) -> None:
    """Leave one kernel switched on, beside torch's plain mathematics for shapes it cannot do."""
    for each, switch in KERNELS.items():
        switch(name is None or each == name)


def measure_on(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> Measure:
    """Median seconds of one forward and backward over [B, H, tokens, d]."""

    def once(qkv: list[torch.Tensor]) -> float:
        query, key, value = qkv
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        F.scaled_dot_product_attention(query, key, value).sum().backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    def measure(name: str) -> float:
        math_was_on = torch.backends.cuda.math_sdp_enabled()  # type: ignore[no-untyped-call]
        use_attention(name)
        torch.backends.cuda.enable_math_sdp(False)  # what the kernel cannot do is an error
        try:
            options: Any = {"device": device, "dtype": dtype, "requires_grad": True}
            qkv = [torch.randn(shape, **options) for _ in range(3)]
            once(qkv)
            return statistics.median(once(qkv) for _ in range(REPEATS))
        finally:
            torch.backends.cuda.enable_math_sdp(math_was_on)
            use_attention(None)

    return measure
