"""Host memory for copies: of the size that is asked for, locked where that is allowed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from qwen_lora.families import host_memory
from qwen_lora.families.host_memory import host_buffer

GPU = torch.device("cuda")


class Driver:
    """What is asked of CUDA, where there is none."""

    def __init__(self, answer: int) -> None:
        self.answer, self.locked = answer, {}

    def init(self) -> None:
        pass

    def cudart(self) -> Driver:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.locked[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


def use(monkeypatch: pytest.MonkeyPatch, answer: int) -> Driver:
    driver = Driver(answer)
    monkeypatch.setattr(host_memory, "CUDA", driver)
    monkeypatch.setattr(host_memory, "_forget_error", lambda: None)
    host_memory._warn_once.cache_clear()
    return driver


def test_it_has_pages_of_its_own() -> None:
    for size in (0, 1, 5000):
        buffer = host_buffer(size, torch.device("cpu"))
        assert buffer.shape == (size,) and buffer.dtype == torch.uint8
        assert size == 0 or buffer.data_ptr() % 4096 == 0
        buffer.fill_(7)


def test_it_is_locked_as_long_as_a_view_of_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, 0)
    buffer = host_buffer(5000, GPU)
    assert driver.locked == {buffer.data_ptr(): 5000}
    view = buffer[64:128].view(torch.float32)
    del buffer
    gc.collect()
    assert driver.locked
    view.fill_(1)
    del view
    gc.collect()
    assert not driver.locked


def test_a_refusal_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, 2)
    buffers: list[Any] = [host_buffer(5000, GPU) for _ in range(3)]
    assert capsys.readouterr().err.count("page-locked memory was refused") == 1
    for buffer in buffers:
        buffer.fill_(1)
