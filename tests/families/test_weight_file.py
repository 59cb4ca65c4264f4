"""Reading ahead: the library's own tensors, in memory that is bounded, and errors for what a mapped
file answers with a signal."""

from __future__ import annotations

import random
import shutil
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_lora.errors import InputError
from qwen_lora.families import weight_file
from qwen_lora.families.qwen_image import loading
from qwen_lora.families.qwen_image.transformer import load_transformer, make_empty
from qwen_lora.families.weight_file import (
    DTYPES,
    Memory,
    NewMemory,
    Ring,
    read_ahead,
    read_memory,
    spans,
)
from qwen_lora.models import ModelFolder, resolve_model

CPU = torch.device("cpu")
SIZES = (0, 1, 3, 64, 999, 4096, 70_001)


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "CHUNK", 1000)
    monkeypatch.setattr(weight_file, "OWN_PAGES", 50_000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = torch.Generator().manual_seed(0)

    def numbers(size: int, dtype: torch.dtype) -> torch.Tensor:
        count = size * torch.empty(0, dtype=dtype).element_size()
        data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=random)
        return data.view(dtype)

    tensors = {f"{n}.{k}": numbers(n, dtype) for n in SIZES for k, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(3.0)
    tensors["matrix"] = torch.arange(600.0).view(20, 30)
    tensors["unknown"] = torch.ones(3, dtype=torch.complex64)
    target = tmp_path_factory.mktemp("weights") / "some.safetensors"
    save_file(tensors, target, metadata={"of": "nothing"})
    return target


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


@pytest.mark.parametrize("memory", [NewMemory(100_000), NewMemory(1), Ring(1_200_000, CPU)])
def test_tensors_are_the_librarys(path: Path, memory: Memory) -> None:
    expected = load_file(path)
    found = spans(path)
    assert set(found) == set(expected) - {"unknown"}
    keys = list(found)
    random.Random(0).shuffle(keys)
    for key, tensor in zip(keys, read_ahead(path, [found[k] for k in keys], memory), strict=True):
        assert tensor.dtype == expected[key].dtype and tensor.shape == expected[key].shape
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), expected[key].view(-1).view(torch.uint8)
        )
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0


def test_new_memory_is_kept_and_bounded(path: Path) -> None:
    expected, found = load_file(path), spans(path)
    memory = NewMemory(100_000)
    kept = dict(zip(found, read_ahead(path, list(found.values()), memory), strict=True))
    assert all(torch.equal(as_bytes(kept[k]), as_bytes(expected[k])) for k in kept)
    taken = [memory.take(40_000) for _ in range(3)]
    assert [one is None for one in taken] == [False, False, True]
    memory.give_back()
    assert memory.take(40_000) is not None
    memory.give_back()
    memory.give_back()
    assert memory.take(1 << 20) is not None  # alone it may be larger


def test_a_ring_gives_nothing_twice() -> None:
    choose = random.Random(0)
    ring = Ring(10_000, CPU)
    taken: deque[tuple[torch.Tensor, int]] = deque()
    refused = 0
    for number in range(3000):
        buffer = ring.take(choose.choice((0, 1, 63, 64, 700, 2500, 4999)))
        if buffer is None:
            assert taken, "with nothing taken there is room for half of it"
            refused += 1
        else:
            taken.append((buffer.fill_(number % 251), number % 251))
        while taken and (buffer is None or choose.random() < 0.3):
            buffer, value = taken.popleft()
            assert bool((buffer == value).all())
            ring.give_back()
    assert refused > 100


def test_a_file_that_ends_too_early(path: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copy(path, tmp_path / "cut.safetensors"))
    found = list(spans(cut).values())
    with cut.open("r+b") as file:
        file.truncate(found[-1].begin)
    with pytest.raises(InputError, match=r"cut\.safetensors ends too early"):
        for _ in read_ahead(cut, found, NewMemory()):
            pass


def test_one_who_stops_early_leaves_nothing_behind(path: Path) -> None:
    ring = Ring(1_200_000, CPU)
    tensors = read_ahead(path, list(spans(path).values()), ring)
    next(tensors)
    next(tensors)
    tensors.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]
    assert ring.take(600_000) is not None


def test_disk_errors_are_one_line(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(weight_file._Handles, "read", fail)
    with pytest.raises(InputError, match=r"\.safetensors cannot be read: Input/output error"):
        load_transformer(model, device=CPU, dtype=torch.float32, base_precision="bf16")


def test_a_transformers_weights_begin_where_kernels_like_it(
    model: ModelFolder, tmp_path: Path
) -> None:
    """A header of any length is in front of them."""
    for length in range(8):
        (source,) = model.component("transformer").glob("*.safetensors")
        target = tmp_path / f"{length}.safetensors"
        save_file(load_file(source), target, metadata={"pad": "x" * 8 * length})
        one = resolve_model(str(model.path), ("transformer",), transformer_file=target)
        loaded = load_transformer(one, device=CPU, dtype=torch.float32, base_precision="bf16")
        assert not [n for n, p in loaded.named_parameters() if p.data_ptr() % 64]


def test_through_memory_that_is_used_again(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the way to a GPU: a copy is placed, and the original's memory is the next one's."""
    assert isinstance(read_memory(CPU), NewMemory)
    place = loading.place
    largest = max(
        span.size
        for f in model.component("transformer").glob("*.safetensors")
        for span in spans(f).values()
    )
    ring = Ring(2 * largest, CPU)
    through = []

    def copied(module: Any, name: str, tensor: torch.Tensor, *rest: Any) -> None:
        through.append(tensor.untyped_storage().data_ptr() == ring._bytes.data_ptr())
        place(module, name, tensor.clone(), *rest)

    monkeypatch.setattr(loading, "read_memory", lambda device: ring)
    monkeypatch.setattr(loading, "place", copied)
    loaded = make_empty(model)
    loading.load_weights(
        loaded, model.component("transformer"), device=CPU, dtype=torch.float32, in_memory=True
    )
    assert all(through)
    expected = load_file(next(model.component("transformer").glob("*.safetensors")))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].float()), name
