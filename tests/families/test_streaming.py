"""Streamed blocks give the bits of resident ones, and no weight is read that has gone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.families import offload
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image import transformer as qwen_transformer
from qwen_lora.families.qwen_image.blocks import run_block
from qwen_lora.families.streaming import BlockStreamer, spread, stream_more
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.lora import LoraSpec, add_lora
from tests.families.late_copies import copies_are_late
from tests.train.test_step_cost import RealStep, small, step_model

CPU = torch.device("cpu")
BLOCKS = 7
MIXED = Shape((8, 12), (5, 3))


class Poisoned(BlockStreamer):
    """Fills a buffer with NaN as soon as its block is left, and keeps a log of copies."""

    def __init__(self, device: torch.device, ring: int = 2) -> None:
        super().__init__(device, ring)
        self.log: list[int] = []  # blocks, as they are copied

    def _leave(self, turn: int, backward: bool) -> None:
        number = self._buffer_of(turn)
        self._buffers[number].fill_(0xFF)
        self._holds[number] = None
        super()._leave(turn, backward)

    def _fetch(self, turn: int) -> None:
        if self._holds[self._buffer_of(turn)] != turn:
            self.log.append(self._order[turn])
        super()._fetch(turn)


class Logged(Poisoned):
    _leave = BlockStreamer._leave


@pytest.fixture
def streamer_is(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(kind: type[BlockStreamer], ring: int = 2) -> None:
        monkeypatch.setattr(qwen_transformer, "BlockStreamer", partial(kind, ring=ring))

    return use


def step_of(folder: Path, on_device: int | None, way: str = "full", **changes: Any) -> RealStep:
    """A model of seven blocks with a LoRA that is not zero."""
    offload = changes.pop("offload", False)
    settings = {"lora_targets": "all-linear", "rank": 4, "modulation_table": False, **changes}
    model = step_model(folder, torch.bfloat16, small(num_layers=BLOCKS), **settings)
    torch.manual_seed(0)
    step = RealStep(model, MIXED, way)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loras(step):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    options = ForwardOptions(
        recompute=Recompute.parse(way), blocks_on_device=on_device, offload_activations=offload
    )
    model.family.prepare_training(step.transformer, options)
    return step


def loras(step: RealStep) -> list[torch.nn.Parameter]:
    return [p for n, p in step.transformer.named_parameters() if ".lora_" in n]


def trained(step: RealStep, steps: int = 3) -> list[torch.Tensor]:
    """Losses of some steps with an evaluation between, then gradients and the LoRA itself."""
    found = []
    for number in range(steps):
        torch.manual_seed(number)  # dropout
        losses = step.losses()
        losses.sum().backward()
        found.append(losses.detach())
        with torch.no_grad():
            for parameter in loras(step):
                assert parameter.grad is not None
                parameter -= 0.05 * parameter.grad
            step.transformer.eval()
            found.append(step.losses())
            step.transformer.train()
    return [*found, *(p.grad for p in loras(step) if p.grad is not None), *loras(step)]


def check_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in ours)


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    return trained(step_of(tmp_path_factory.mktemp("resident"), None))


@pytest.mark.parametrize("ring", [2, 3])
@pytest.mark.parametrize("on_device", [0, 1, BLOCKS // 2, BLOCKS - 1, BLOCKS])
def test_not_a_bit_differs(
    tmp_path: Path,
    resident: list[torch.Tensor],
    streamer_is: Callable[..., None],
    on_device: int,
    ring: int,
) -> None:
    streamer_is(Poisoned, ring)
    step = step_of(tmp_path, on_device)
    streamer = step.transformer.streamer
    assert len(streamer.blocks) == BLOCKS - on_device
    check_equal(trained(step), resident)
    assert bool(streamer.log) == (on_device < BLOCKS)


@pytest.mark.parametrize(
    ("way", "dropout"),
    [
        ("none", 0.3),
        ("selective", 0.3),
        pytest.param("2", 0.3, marks=pytest.mark.slow),
        pytest.param("none", 0.0, marks=pytest.mark.slow),
        pytest.param("selective", 0.0, marks=pytest.mark.slow),
    ],
)
def test_whatever_else_is_recomputed(
    tmp_path: Path, streamer_is: Callable[..., None], way: str, dropout: float
) -> None:
    expected = trained(step_of(tmp_path / "a", None, "full", lora_dropout=dropout))
    streamer_is(Poisoned)
    check_equal(trained(step_of(tmp_path / "b", 3, way, lora_dropout=dropout)), expected)


def test_each_block_comes_once_a_pass(tmp_path: Path, streamer_is: Callable[..., None]) -> None:
    """Up in the forward pass and down in the backward pass, two ahead; at the turns what is there
    stays."""
    streamer_is(Logged)
    step = step_of(tmp_path, 1)
    streamer = step.transformer.streamer
    assert streamer.blocks == [1, 2, 3, 4, 5, 6]
    for _ in range(2):
        step.losses().sum().backward()
    assert streamer.log == [1, 2, *[3, 4, 5, 6, 4, 3, 2, 1] * 2]
    bytes_of_block = streamer.host_bytes // 6
    assert streamer.copied_bytes == len(streamer.log) * bytes_of_block
    assert streamer.device_bytes == 2 * bytes_of_block
    with torch.no_grad():
        step.losses()
        step.losses()
    assert streamer.log[18:] == [3, 4, 5, 6, 1, 2, 3, 4, 5, 6]


def test_the_next_block_is_fetched_when_one_is_left(
    tmp_path: Path, streamer_is: Callable[..., None]
) -> None:
    """Copying has the time of the blocks between: block t + 2 comes when block t is left."""
    streamer_is(Logged)
    streamer = step_of(tmp_path, 3).transformer.streamer
    assert streamer.blocks == [1, 3, 5, 6]
    streamer.begin()
    assert streamer.log == [1, 3]
    seen = []
    for block in range(BLOCKS):
        streamer.enter(block)
        seen.append(len(streamer.log))
    assert seen == [2, 2, 3, 3, 4, 4, 4]
    for block in reversed(range(BLOCKS)):
        streamer.enter(block, backward=True)
        seen.append(len(streamer.log))
    assert streamer.log == [1, 3, 5, 6, 3, 1] and seen[BLOCKS:] == [4, 5, 6, 6, 6, 6, 6]


def test_an_unfinished_pass_harms_no_other(
    tmp_path: Path, streamer_is: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of forward or backward, then the same step again."""
    expected = step_of(tmp_path / "a", None)
    expected.losses().sum().backward()
    streamer_is(Poisoned)
    step = step_of(tmp_path / "b", 2)
    original, calls = run_block, 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (4, 4 + BLOCKS + 3):
            raise torch.OutOfMemoryError("made up")
        return original(*args)

    how = step.transformer.own_forward
    for name in ("_run", "_run_again"):
        monkeypatch.setattr(how, name, failing)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            step.losses().sum().backward()
    for parameter in loras(step):
        parameter.grad = torch.zeros_like(parameter)
    step.losses().sum().backward()
    check_equal([p.grad for p in loras(step) if p.grad is not None],
                [p.grad for p in loras(expected) if p.grad is not None])  # fmt: skip


def test_more_blocks_can_go_at_any_time(
    tmp_path: Path, resident: list[torch.Tensor], streamer_is: Callable[..., None]
) -> None:
    streamer_is(Poisoned)
    step = step_of(tmp_path, 6)
    before = set(step.transformer.streamer.blocks)
    step.losses().sum().backward()
    for parameter in loras(step):
        parameter.grad = torch.zeros_like(parameter)
    step.family.prepare_training(step.transformer, ForwardOptions(blocks_on_device=2))
    after = set(step.transformer.streamer.blocks)
    assert before < after and len(after) == 5
    check_equal(trained(step), resident)


@pytest.mark.parametrize("ring", [2, 3])
@pytest.mark.parametrize("on_device", [0, 3])
def test_copies_that_come_as_late_as_they_may(
    tmp_path: Path,
    resident: list[torch.Tensor],
    streamer_is: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    on_device: int,
    ring: int,
) -> None:
    """Nobody reads a buffer before the copy into it has been waited for."""
    late = copies_are_late(monkeypatch)
    streamer_is(BlockStreamer, ring)
    check_equal(trained(step_of(tmp_path, on_device, offload=on_device == 3)), resident)
    assert late.late > 20


def test_they_are_spread_evenly() -> None:
    assert spread(60, 0) == [] and spread(60, 60) == list(range(60))
    for streamed in range(1, 60):
        chosen = spread(60, streamed)
        assert len(chosen) == streamed
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1


# ---- layouts -------------------------------------------------------------------------------------


def test_any_storage_of_a_block(tmp_path: Path) -> None:
    """8-bit numbers, columns one behind the other, buffers, one memory with two names."""

    def block(number: int) -> torch.nn.Module:
        random = torch.Generator().manual_seed(number)
        made = torch.nn.Module()
        weight = torch.randn(6, 10, generator=random)
        made.a = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
        made.b = torch.nn.Parameter(weight.bfloat16().t(), requires_grad=False)
        made.c = torch.nn.Parameter((weight * 9).to(torch.int8), requires_grad=False)
        made.register_buffer("scale", weight[:, 0].clone())
        made.register_buffer("same", made.c.data)
        made.register_buffer("none", torch.empty(0))
        made.trained = torch.nn.Parameter(weight[:, :3].clone())
        return made

    blocks, originals = ([block(number) for number in range(5)] for _ in range(2))
    streamer = BlockStreamer(CPU)
    stream_more(streamer, blocks, 0)
    assert len({b.scale.untyped_storage().data_ptr() for b in blocks}) == 2
    streamer.begin()
    for index in (0, 1, 2, 3, 4, 3, 2, 1, 0):
        streamer.enter(index)
        for name, expected in originals[index].state_dict().items():
            found = blocks[index].state_dict()[name]
            assert torch.equal(found.float(), expected.float()), name
            assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert blocks[index].same.data_ptr() == blocks[index].c.data_ptr()
    assert streamer.host_bytes < 5 * 6 * 256


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Five blocks, whose weights lie in several files."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    made = QwenImageTransformer2DModel(**small(num_layers=5, attention_head_dim=64,
                                               axes_dims_rope=[16, 24, 24]))  # fmt: skip
    made.bfloat16().save_pretrained(folder / "transformer", max_shard_size="3MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return resolve_model(str(folder), ("transformer",))


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_loading_puts_blocks_on_the_host(
    deep_model: ModelFolder,
    precision: str,
    streamer_is: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same losses and gradients; while it loads, at most two streamed blocks are on the device
    (files may end in the middle of one), and afterwards the buffers alone."""
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")

    def run(on_device: int | None) -> tuple[Any, list[torch.Tensor]]:
        transformer: Any = deep_model.family.load_transformer(
            deep_model,
            device=CPU,
            dtype=torch.bfloat16,
            base_precision=precision,
            blocks_on_device=on_device,
        )
        settings = Settings(rank=4, lora_targets="all-linear")
        parameters = add_lora(
            transformer, LoraSpec.from_settings(settings), deep_model.family, seed=1
        )
        deep_model.family.prepare_training(transformer, ForwardOptions())
        step = RealStep.__new__(RealStep)
        step.transformer, step.family, step.shape = transformer, deep_model.family, MIXED
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in parameters:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
        step.latents = torch.randn(2, 16, *MIXED.latent_size, generator=random)
        step.noise = torch.randn(2, 16, *MIXED.latent_size, generator=random)
        step.texts = [torch.randn(n, 40, generator=random).bfloat16() for n in MIXED.text_tokens]
        found = []
        for _ in range(2):
            losses = step.losses()
            losses.sum().backward()
            found.append(losses.detach())
        return transformer, [*found, *(p.grad for _, p in parameters if p.grad is not None)]

    _, expected = run(None)
    streamer_is(Poisoned)
    waiting: list[int] = []
    placed = qwen_transformer._Filling.placed

    def watch(self: Any, name: str) -> None:
        placed(self, name)
        begun = [
            index
            for index in self._missing
            if self._missing[index]
            and any(p.device.type != "meta" for p in self._blocks[index].parameters())
        ]
        waiting.append(len(begun))

    monkeypatch.setattr(qwen_transformer._Filling, "placed", watch)
    transformer, found = run(1)
    check_equal(found, expected)
    assert max(waiting) <= 2
    streamer = transformer.streamer
    assert streamer.blocks == [1, 2, 3, 4]
    memories = {
        p.untyped_storage().data_ptr()
        for index in streamer.blocks
        for p in transformer.transformer_blocks[index].parameters()
        if not p.requires_grad
    }
    assert len(memories) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
@pytest.mark.parametrize(
    ("way", "on_device", "offloaded", "lengths", "late"),
    [
        ("full", 0, False, (5, 5), False),
        ("none", 3, False, (5, 5), True),
        ("3", 2, True, (5, 5), False),
        ("3", 2, True, (5, 5), True),
        ("3", 2, True, (5, 3), False),
    ],
)
def test_compiled_blocks_are_streamed(
    tmp_path: Path,
    streamer_is: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    on_device: int,
    offloaded: bool,
    lengths: tuple[int, ...],
    late: bool,
) -> None:
    """Not a bit differs. late: with copies that come as late as they may."""
    monkeypatch.setattr(offload, "LARGE", 1024)  # the tiny model's tensors are small
    torch._dynamo.reset()  # the other ways' graphs count towards the limit, past which none is used

    def run(name: str, on_device: int | None, offloaded: bool) -> list[torch.Tensor]:
        step = step_of(tmp_path / name, on_device)
        step.shape = Shape(MIXED.latent_size, lengths)
        step.texts = [step.texts[0][:count] for count in lengths]
        how = ForwardOptions(
            recompute=Recompute.parse(way), compiled=True, offload_activations=offloaded
        )
        step.family.prepare_training(step.transformer, how)
        return trained(step, steps=2)

    expected = run("a", None, False)
    copies = copies_are_late(monkeypatch) if late else None
    streamer_is(BlockStreamer if late else Poisoned)
    found = run("b", on_device, offloaded)
    assert copies is None or copies.late
    check_equal(found, expected)
