"""CUDA's streams and events as far as copies need them, on a CPU: a copy on another stream is made
when somebody waits for it and not before, the latest that a GPU may make it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qwen_lora.families import offload, streaming


class Stream:
    def __init__(self, *_: Any) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0

    def run_to(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()

    def wait_stream(self, other: Stream) -> None:
        position = len(other.queue)
        self.queue.append(lambda: other.run_to(position))

    def wait_event(self, event: Event) -> None:
        self.queue.append(event.happen)
        if self is COMPUTE:
            self.run_to(len(self.queue))


COMPUTE = Stream()  # what is queued here is done at once


class Event:
    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, len(stream.queue)

    def happen(self) -> None:
        if self.stream is not None:
            self.stream.run_to(self.position)


class LateCuda:
    Stream, Event = Stream, Event
    current = COMPUTE
    late = 0  # copies that were put off

    def current_stream(self, *_: Any) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, *_: Any) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.current is not COMPUTE, "a copy on the computing stream"
        target.view(torch.uint8).fill_(0xFF)  # until it is made
        memory = weakref.ref(source.untyped_storage())
        where = source.storage_offset(), source.shape, source.stride()
        dtype = source.dtype

        def make() -> None:
            if (storage := memory()) is None:
                return  # it was given away before it was read
            found = torch.empty(0, dtype=dtype).set_(storage, *where)  # type: ignore[call-overload]
            with torch.no_grad():
                target.copy_(found)

        self.late += 1
        self.current.queue.append(make)


def copies_are_late(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    """For streamers and offloading that are made from now on."""
    cuda = LateCuda()
    for module in (streaming, offload):
        monkeypatch.setattr(module, "CUDA", cuda)
        monkeypatch.setattr(module, "copy", cuda.copy)
        monkeypatch.setattr(module, "is_gpu", lambda _: True)
    return cuda
