# ruff: noqa: TID253
"""Which attention kernel a GPU is fastest with: measured at the start of a run, since it differs
from card to card (cuDNN's is twice as fast as flash on one and slower on another). Besides torch's
own there is FlashAttention 3 (arXiv:2407.08608), where its package is installed: torch puts it in
the place of its flash kernel.

The choice is kept in the checkpoints: a resumed run uses the kernel it began with, and its bits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import attention as torchs

from qwen_lora.errors import InputError

# name -> how torch.backends.cuda switches it
KERNELS: Mapping[str, Callable[[bool], None]] = {
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
}
FLASH3 = "flash3"
_FA3 = "FA3"  # torch's name for it
_NEEDED = ("current_flash_attention_impl", "restore_flash_attention_impl")  # in newer versions
REPEATS = 5

Measure = Callable[[str], float]  # seconds of a kernel; RuntimeError when it cannot do it


def choose_attention(wanted: str, device: torch.device, measure: Measure) -> str | None:
    """The kernel to use on a GPU; None: torch's own choice, always on a CPU.

    wanted: auto measures all that can do it, torch measures none, otherwise a kernel's name or
    flash3.
    Raises InputError for a kernel that this GPU cannot run.
    """
    if device.type != "cuda" or wanted == "torch":
        return None
    taken: dict[str, float] = {}
    for name in (*KERNELS, FLASH3) if wanted == "auto" else (wanted,):
        try:
            taken[name] = measure(name)
        except (RuntimeError, InputError) as error:
            if wanted != "auto":
                raise InputError(f"attention {name} does not run on this GPU: {error}") from error
    return min(taken, key=lambda name: taken[name]) if taken else None


def use_attention(name: str | None) -> None:
    """Leave one kernel switched on, beside torch's plain mathematics for shapes it cannot do.
    Raises InputError for flash3 where it is not installed or torch does not know it."""
    _put_in_place(name == FLASH3)
    place = "flash" if name == FLASH3 else name
    for each, switch in KERNELS.items():
        switch(name is None or each == place)


def _put_in_place(flash3: bool) -> None:
    """FlashAttention 3 where torch's flash kernel is, or that one again."""
    if (
        not all(hasattr(torchs, name) for name in _NEEDED)
        or _FA3 not in torchs.list_flash_attention_impls()
    ):
        if flash3:
            raise InputError(f"torch {torch.__version__} cannot use FlashAttention 3")
        return
    if flash3 == (torchs.current_flash_attention_impl() == _FA3):
        return
    if not flash3:
        torchs.restore_flash_attention_impl()
        return
    try:
        torchs.activate_flash_attention_impl(_FA3)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"FlashAttention 3 is not installed ({error})") from error


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
