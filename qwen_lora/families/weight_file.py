# ruff: noqa: TID253
"""Reads the tensors of a safetensors file before they are asked for, with several threads.

A mapped file is read while it is touched, a few pages at a time and by the thread that waits for
them; and where a disk fails under it, the process gets a signal. Large reads beside each other keep
a disk or a network's file system busy, go straight to where they are wanted, and fail with an
error. Which memory that is decides the device: page-locked for a GPU, which the next tensors use
again; on a CPU new memory, aligned as torch's own, which a tensor may stay in.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any, BinaryIO, Protocol

import torch

from qwen_lora.errors import InputError
from qwen_lora.families.host_memory import ALIGNED, host_buffer

THREADS = 4
CHUNK = 8 << 20  # bytes of one read
AHEAD = 256 << 20  # bytes that are read and not yet used
OWN_PAGES = 1 << 20  # bytes from which memory is asked of the system, in large pages
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in its file."""

    begin: int
    size: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class Memory(Protocol):
    """Where tensors are read to. What is taken first is given back first."""

    limit: float  # bytes of the largest tensor that can be taken

    def take(self, size: int) -> torch.Tensor | None:
        """[size] uint8, or None while there is no room; with nothing taken there is."""

    def give_back(self) -> None: ...


def read_memory(device: torch.device) -> Memory:
    return NewMemory() if device.type == "cpu" else Ring(AHEAD, device)


class NewMemory:
    """Each tensor gets its own, and keeps it for as long as anything refers to it."""

    limit: float = math.inf

    def __init__(self, ahead: int = AHEAD) -> None:
        self._ahead = ahead
        self._taken: deque[int] = deque()

    def take(self, size: int) -> torch.Tensor | None:
        if self._taken and sum(self._taken) + size > self._ahead:
            return None
        self._taken.append(size)
        if size < OWN_PAGES:
            return torch.empty(size, dtype=torch.uint8)
        return host_buffer(size, torch.device("cpu"))

    def give_back(self) -> None:
        self._taken.popleft()


class Ring:
    """One buffer, taken from and given back in order. A tensor in it is valid until then."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._bytes = host_buffer(size, device)
        self._size = size
        self.limit: float = size // 2  # with less it fits on either side of the end
        # Positions only grow; modulo the size they are places in the buffer.
        self._begin = self._end = 0
        self._ends: deque[int] = deque()

    def take(self, size: int) -> torch.Tensor | None:
        begin = -(-self._end // ALIGNED) * ALIGNED
        if begin % self._size + size > self._size:
            begin += self._size - begin % self._size
        if begin + size - self._begin > self._size:
            return None
        self._end = begin + size
        self._ends.append(self._end)
        place = begin % self._size
        return self._bytes[place : place + size]

    def give_back(self) -> None:
        self._begin = self._ends.popleft()


def spans(path: Path) -> dict[str, Span]:
    """Every tensor of a file that the library has found whole, but those of types that torch or
    this project do not know."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {
        key: Span(8 + length + entry["data_offsets"][0], _size(entry), dtype, (*entry["shape"],))
        for key, entry in header.items()
        if key != "__metadata__" and (dtype := DTYPES.get(entry["dtype"])) is not None
    }


def _size(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


def read_ahead(path: Path, wanted: Sequence[Span], memory: Memory) -> Generator[torch.Tensor]:
    """The tensors in the order of `wanted`, none larger than the memory's limit. In a ring each is
    valid until the next one is asked for.

    Raises OSError for what cannot be read and InputError for a file that ends too early.
    """
    waiting, reading = deque(wanted), deque[tuple[Span, torch.Tensor, list[Future[None]]]]()
    handles = _Handles(path)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")
    try:
        while waiting or reading:
            while waiting and (buffer := memory.take(waiting[0].size)) is not None:
                span = waiting.popleft()
                parts = [
                    pool.submit(handles.read, span.begin + at, buffer[at : at + CHUNK])
                    for at in range(0, span.size, CHUNK)
                ]
                reading.append((span, buffer, parts))
            span, buffer, parts = reading[0]
            for part in parts:
                part.result()
            yield buffer.view(span.dtype).view(span.shape)
            del buffer
            reading.popleft()
            memory.give_back()
    finally:
        pool.shutdown(cancel_futures=True)
        handles.close()
        while reading:
            reading.popleft()
            memory.give_back()


class _Handles:
    """One file, opened once by each thread, since a handle has one position."""

    def __init__(self, path: Path) -> None:
        self._path, self._own = path, local()
        self._open: list[BinaryIO] = []

    def read(self, begin: int, target: torch.Tensor) -> None:
        file = getattr(self._own, "file", None)
        if file is None:
            file = self._own.file = self._path.open("rb", buffering=0)
            self._open.append(file)
        file.seek(begin)
        view = target.numpy().data
        while view.nbytes:
            count = file.readinto(view)
            if not count:
                raise InputError(f"{self._path} ends too early; download the model again")
            view = view[count:]

    def close(self) -> None:
        for file in self._open:
            file.close()
