"""Activations that wait on the host come back bit for bit, one block ahead, into memory that is
used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.families import offload
from qwen_lora.families.base import ForwardOptions, Recompute, among
from qwen_lora.families.offload import COMPILED, ActivationOffload
from qwen_lora.train.cost.shapes import Shape
from tests.families.late_copies import copies_are_late
from tests.families.test_streaming import (
    BLOCKS,
    Poisoned,
    check_equal,
    step_of,
    streamer_is,
    trained,
)

__all__ = ["streamer_is"]


class Poisoning(ActivationOffload):
    """Overwrites host memory that is given back, and logs what is fetched for which block."""

    log: list[tuple[str, int]]

    def give_back(self, buffer: torch.Tensor) -> None:
        buffer.fill_(0xFF)
        super().give_back(buffer)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if hasattr(packed, "block"):
            self.log.append(("used", packed.block.index))
        return super()._unpack(packed)

    def _fetch(self, block: Any) -> None:
        if block.left:
            self.log.append(("fetched", block.index))
        super()._fetch(block)


@pytest.fixture(autouse=True)
def poisoning(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_lora.families.qwen_image import forward

    monkeypatch.setattr(forward, "ActivationOffload", Poisoning)
    monkeypatch.setattr(Poisoning, "log", [], raising=False)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "on_device"),
    [
        ("full", None),
        ("selective", 0),
        ("3", 3),
        *(
            pytest.param(way, on_device, marks=SLOW)
            for way in ("full", "selective", "3")
            for on_device in (None, 0, 3)
        ),
    ],
)
def test_not_a_bit_differs(
    tmp_path: Path, streamer_is: Callable[..., None], way: str, on_device: int | None
) -> None:
    expected = trained(step_of(tmp_path / "a", None, way), steps=2)
    streamer_is(Poisoned)
    step = step_of(tmp_path / "b", on_device, way, offload=True)
    check_equal(trained(step, steps=2), expected)
    assert Poisoning.log


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize(
    ("way", "stay", "late"),
    [("none", 0, False), ("3", 0, True), ("full", 0, False), ("3", 2, True)],
)
def test_what_compiled_blocks_keep_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, stay: int, late: bool
) -> None:
    """late: with copies that come as late as they may."""
    monkeypatch.setattr(offload, "LARGE", 1024)  # the tiny model's tensors are small
    torch._dynamo.reset()  # the other ways' graphs count towards the limit, past which none is used

    def compiled(folder: Path, offloaded: bool) -> list[torch.Tensor]:
        step = step_of(folder, None, way)
        step.shape = Shape(step.shape.latent_size, (3, 3))
        step.texts = [text[:3] for text in step.texts]
        how = ForwardOptions(
            recompute=Recompute.parse(way),
            compiled=True,
            offload_activations=offloaded,
            activations_on_device=stay,
        )
        step.family.prepare_training(step.transformer, how)
        return trained(step, steps=2)

    expected = compiled(tmp_path / "a", False)
    copies = copies_are_late(monkeypatch) if late else None
    check_equal(compiled(tmp_path / "b", True), expected)
    fetched = {block for entry, block in Poisoning.log if entry == "fetched"}
    others = BLOCKS - COMPILED
    leaving = {block for block in range(others) if not among(block, stay, others)}
    assert fetched == (set() if way == "none" else leaving)
    assert copies is None or copies.late


def test_copies_that_come_as_late_as_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has left is not given away before it is read, and what comes back is waited for."""
    expected = trained(step_of(tmp_path / "a", None), steps=2)
    late = copies_are_late(monkeypatch)
    check_equal(trained(step_of(tmp_path / "b", None, offload=True), steps=2), expected)
    assert late.late == 2 * 2 * 2 * (BLOCKS - 1)


def test_one_block_ahead_and_each_tensor_once(tmp_path: Path) -> None:
    """Two tensors a block, image and text; the last block's stay, its neighbour's come while it
    computes."""
    step = step_of(tmp_path, None, offload=True)
    losses = step.losses()
    assert not Poisoning.log
    losses.sum().backward()
    log = Poisoning.log
    for block in reversed(range(BLOCKS)):
        assert log.count(("used", block)) == 2
        assert log.count(("fetched", block)) == (block < BLOCKS - 1)
        if block:
            assert log.index(("fetched", block - 1)) < log.index(("used", block - 1))
            after = [n for n, entry in enumerate(log) if entry == ("used", block)]
            assert after[0] < log.index(("fetched", block - 1)), "two blocks ahead"


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    """Over steps, sizes and passes that end early."""
    step = step_of(tmp_path, None, offload=True)
    host = step.transformer.own_forward.offload
    expected = (BLOCKS - 1) * (sum(step.shape.text_tokens) + 2 * 24) * 48 * 2  # bytes

    def held() -> int:
        step.losses().sum().backward()
        host.begin()
        return int(host.free_bytes)

    assert held() == held() == expected
    step.losses()  # no backward pass
    assert held() == expected
    step.shape = Shape((4, 6), step.shape.text_tokens)
    step.latents, step.noise = (torch.randn(2, 16, 4, 6) for _ in range(2))
    assert held() == expected
    step.shape = Shape((16, 12), step.shape.text_tokens)
    step.latents, step.noise = (torch.randn(2, 16, 16, 12) for _ in range(2))
    larger = held()
    assert held() == larger <= 2.2 * expected


def test_no_gradient_no_copy(tmp_path: Path) -> None:
    step = step_of(tmp_path, None, offload=True)
    with torch.no_grad():
        step.losses()
    assert step.transformer.own_forward.offload.free_bytes == 0


def test_what_is_kept_on_the_device(tmp_path: Path) -> None:
    """A CPU's storages: of all blocks' inputs those of two remain at a time."""
    from qwen_lora.train.cost.trace import trace

    kept = {}
    for offloaded in (False, True):
        step = step_of(tmp_path / str(offloaded), None, offload=offloaded)
        step.losses().sum().backward()
        kept[offloaded] = trace(step.losses, "cpu", warm=True)
    inputs = (sum(step.shape.text_tokens) + 2 * 24) * 48 * 2
    saved = kept[False].kept - kept[True].kept
    assert (BLOCKS - 2) * inputs <= saved <= BLOCKS * inputs
    assert kept[True].peak < kept[False].peak - (BLOCKS - 4) * inputs
