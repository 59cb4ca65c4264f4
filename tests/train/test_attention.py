"""The choice of an attention kernel. The kernels themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qwen_lora.errors import InputError
from qwen_lora.train.attention import KERNELS, choose_attention, use_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def timed(seconds: dict[str, float]) -> tuple[list[str], object]:
    asked: list[str] = []

    def measure(name: str) -> float:
        asked.append(name)
        if name not in seconds:
            raise RuntimeError(f"no {name} here")
        return seconds[name]

    return asked, measure


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"cudnn": 2.0, "flash": 1.0, "efficient": 3.0}, "flash"),
        ({"cudnn": 1.0, "efficient": 3.0}, "cudnn"),
        ({"efficient": 3.0}, "efficient"),
        ({}, None),
    ],
)
def test_the_fastest_that_runs(seconds: dict[str, float], chosen: str | None) -> None:
    asked, measure = timed(seconds)
    assert choose_attention("auto", GPU, measure) == chosen  # type: ignore[arg-type]
    assert asked == list(KERNELS)


def test_a_named_one_is_tried_and_taken() -> None:
    asked, measure = timed({"efficient": 1.0, "flash": 0.5})
    assert choose_attention("efficient", GPU, measure) == "efficient"  # type: ignore[arg-type]
    assert asked == ["efficient"]
    with pytest.raises(InputError, match="attention cudnn does not run on this GPU: no cudnn here"):
        choose_attention("cudnn", GPU, measure)  # type: ignore[arg-type]


@pytest.mark.parametrize(("wanted", "device"), [("auto", CPU), ("flash", CPU), ("torch", GPU)])
def test_torchs_own_choice(wanted: str, device: torch.device) -> None:
    asked, measure = timed({"flash": 0.5})
    assert choose_attention(wanted, device, measure) is None  # type: ignore[arg-type]
    assert not asked


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    use_attention(None)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("name", [*KERNELS, None])
def test_the_others_are_switched_off(name: str | None) -> None:
    use_attention(name)
    backends = torch.backends.cuda
    on = {
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
    }
    assert {each for each, switched in on.items() if switched} == ({name} if name else set(KERNELS))
    assert backends.math_sdp_enabled()
