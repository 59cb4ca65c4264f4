"""The choice of an attention kernel. The kernels themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import _registry

from qwen_lora.errors import InputError
from qwen_lora.train.attention import (
    FLASH3,
    KERNELS,
    choose_attention,
    measure_on,
    use_attention,
)

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
        ({"flash": 2.0, "flash3": 1.0}, "flash3"),
        ({}, None),
    ],
)
def test_the_fastest_that_runs(seconds: dict[str, float], chosen: str | None) -> None:
    asked, measure = timed(seconds)
    assert choose_attention("auto", GPU, measure) == chosen  # type: ignore[arg-type]
    assert asked == [*KERNELS, FLASH3]


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
    assert switched_on() == ({name} if name else set(KERNELS))
    assert torch.backends.cuda.math_sdp_enabled()


def switched_on() -> set[str]:
    backends = torch.backends.cuda
    on = {
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
    }
    return {name for name, switched in on.items() if switched}


class StandIn:
    """For FlashAttention 3, in torch's registry."""

    def __init__(self) -> None:
        self.active = 0

    def __call__(self) -> StandIn:
        self.active += 1
        return self

    def remove(self) -> None:
        self.active -= 1


@pytest.mark.usefixtures("as_before")
def test_flash_attention_3_takes_the_place_of_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", stand_in)
    for name, others in ((FLASH3, {"flash"}), (FLASH3, {"flash"}), ("flash", {"flash"})):
        use_attention(name)
        assert (stand_in.active, switched_on()) == (int(name == FLASH3), others)
    use_attention(FLASH3)
    use_attention(None)
    assert (stand_in.active, switched_on()) == (0, set(KERNELS))


@pytest.mark.usefixtures("as_before")
def test_flash_attention_3_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measure_on(CPU, torch.float32, (1, 1, 2, 8))
    with pytest.raises(InputError, match=r"FlashAttention 3 is not installed \(.*flash_attn_int"):
        use_attention(FLASH3)
    with pytest.raises(InputError, match="attention flash3 does not run on this GPU: FlashAtt"):
        choose_attention(FLASH3, GPU, measure)
    monkeypatch.delitem(_registry._FLASH_ATTENTION_IMPLS, "FA3")
    with pytest.raises(InputError, match="torch .* cannot use FlashAttention 3"):
        use_attention(FLASH3)
    assert switched_on() == set(KERNELS)
