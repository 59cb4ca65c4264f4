# ruff: noqa: TID253
"""Host memory that a GPU copies from and to without help of the processor."""

from __future__ import annotations

import mmap
import sys
import weakref
from contextlib import suppress
from functools import cache
from typing import Any

import torch

CUDA: Any = torch.cuda  # much of it has no types
ALIGNED = 64  # bytes; every type and every kernel may start there


def host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """[size] uint8 on the CPU, page-locked if `device` is a GPU. Where locking is refused (limits
    of the system) the memory is ordinary, and a warning says so once: copies are then slower and
    nothing is computed meanwhile.

    In large pages where the system has them, which are filled and locked in half of the time and
    less (docs/speed.md). Not torch's own pinned memory: that takes the next power of two of bytes.
    """
    pages = _new_pages(max(size, 1))
    buffer = torch.frombuffer(pages, dtype=torch.uint8)[:size]
    if is_gpu(device) and not _lock(buffer, pages):
        _warn_once()
    return buffer


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """On the current stream, between a GPU and locked memory, without waiting for it."""
    target.copy_(source, non_blocking=True)


def _new_pages(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    # Shared memory, the default, has large pages only where an administrator allows them.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _lock(buffer: torch.Tensor, pages: mmap.mmap) -> bool:
    cudart, address = CUDA.cudart(), buffer.data_ptr()
    CUDA.init()
    if hasattr(mmap, "MADV_DONTFORK"):
        # Pages shared with a child are copied when written: the GPU would keep the old ones.
        pages.madvise(mmap.MADV_DONTFORK)
    if int(cudart.cudaHostRegister(address, len(pages), 0)) != 0:
        _forget_error()
        return False
    weakref.finalize(buffer.untyped_storage(), cudart.cudaHostUnregister, address).atexit = False
    return True


def _forget_error() -> None:
    """A refusal stays behind as the last error, which the next kernel would report as its own."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass


@cache
def _warn_once() -> None:
    print(
        "warning: page-locked memory was refused (see ulimit -l; on WSL2 the limit is half of the "
        "memory); copies to the GPU will be slow",
        file=sys.stderr,
    )
