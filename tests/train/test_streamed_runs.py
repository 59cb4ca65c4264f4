"""Streamed blocks in the planner and in a run: predicted bytes are those held and copied, the
choice is the largest that fits, and the LoRA has the bytes of a run without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_sets import MakeSettings
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.streaming import RING
from qwen_lora.models import resolve_model
from qwen_lora.posix import free_memory
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.cost import settle
from qwen_lora.train.cost.choice import GIB, RESERVE, choose, too_small, usable_bytes
from qwen_lora.train.cost.shapes import Shape, bucket_loads, largest_load
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.trace import trace
from qwen_lora.train.cost.ways import Way
from qwen_lora.train.plan import BatchRule
from qwen_lora.train.run import train
from qwen_lora.train.table import PlanTable
from tests.train.test_step_cost import REAL, SHAPES, RealStep, like, small, step_model

SHAPE = Shape((128, 128), (256,))


@pytest.mark.parametrize("on_device", [0, 2, 5, 6])
def test_predicted_bytes_are_held_and_copied(tmp_path: Path, on_device: int) -> None:
    """Of a model whose tensors need no gaps between them. The buffers stand for the blocks."""
    config = small(num_layers=6, attention_head_dim=64, axes_dims_rope=[16, 24, 24],
                   num_attention_heads=2)  # fmt: skip
    model = step_model(tmp_path, torch.bfloat16, config, rank=4, modulation_table=False)
    step = RealStep(model, SHAPES[2], "full")
    options = ForwardOptions(blocks_on_device=on_device)
    step.family.prepare_training(step.transformer, options)
    cost = model.cost(SHAPES[2], Recompute("full"), on_device)
    memories = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for n, p in step.transformer.named_parameters()
        if ".lora_" not in n
    }
    streamer = step.transformer.streamer
    # Norms of queries and keys have 64 numbers, in 128 of 256 bytes.
    assert cost.weights == pytest.approx(sum(memories.values()), rel=0.001)
    assert cost.host == pytest.approx(streamer.host_bytes, rel=0.001)
    step.losses().sum().backward()
    before = streamer.copied_bytes
    step.losses().sum().backward()
    assert cost.traffic == pytest.approx(streamer.copied_bytes - before, rel=0.001)


@pytest.mark.parametrize("way", ["full", "selective", "1"])
def test_what_offloading_leaves_on_the_device(tmp_path: Path, way: str) -> None:
    """Traced without memory as with it."""
    changes = {"lora_targets": "all-linear", "modulation_table": False, "rank": 4}
    model = step_model(tmp_path, torch.bfloat16, small(), offload_activations=True, **changes)
    plain = step_model(tmp_path, torch.bfloat16, small(), **changes)
    shape, recompute = SHAPES[1], Recompute.parse(way)
    step = RealStep(model, shape, way)
    options = ForwardOptions(recompute=recompute, offload_activations=True)
    step.family.prepare_training(step.transformer, options)
    found = trace(step.losses, "cpu")
    cost = model.cost(shape, recompute)
    kept = cost.activations - step.inputs
    assert kept == pytest.approx(found.kept, rel=0.01)
    assert kept + cost.workspace == pytest.approx(found.peak, rel=0.01)
    without = plain.cost(shape, recompute).activations
    assert cost.activations <= without - (0 if way == "1" else 0.04 * without)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> StepModel:
    """The real model; see `like` for other settings."""
    return step_model(tmp_path_factory.mktemp("real"), torch.bfloat16, REAL)


def test_as_many_blocks_stay_as_fit(real: StepModel) -> None:
    """Of the real model at 1024 px: with one byte less there is one block less."""
    model = real
    full = model.cost(SHAPE, Recompute("full"))
    assert choose(model, SHAPE, full.peak).way == Way(Recompute("full"))
    assert choose(model, SHAPE, full.peak - 1).way == Way(Recompute("full"), 60 - RING - 1)
    for on_device in (40, 20, 0):
        cost = model.cost(SHAPE, Recompute("full"), on_device)
        choice = choose(model, SHAPE, cost.peak)
        assert choice.way.on_device == on_device and not choice.missing
        assert choice.cost.peak == full.peak - (60 - on_device - RING) * model.block_bytes
        assert choice.cost.traffic == 2 * (60 - on_device - RING) * model.block_bytes
        less = choose(model, SHAPE, cost.peak - 1)
        assert (less.way.on_device, less.missing) == ((on_device - 1, 0) if on_device else (0, 1))
    assert choose(model, SHAPE, None).way == Way(Recompute("full"))


def test_settings_are_obeyed(real: StepModel, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], Way]] = [
        ({"blocks_on_device": "all"}, Way(Recompute("full"))),
        ({"blocks_on_device": "60"}, Way(Recompute("full"))),
        ({"blocks_on_device": "30"}, Way(Recompute("full"), 30)),
        ({"recompute": "selective", "blocks_on_device": "0"}, Way(Recompute("selective"), 0)),
        ({"recompute": "20", "blocks_on_device": "0"}, Way(Recompute("full"), 0)),
        ({"gradient_checkpointing": False}, Way(Recompute("none"))),
        (
            {"gradient_checkpointing": False, "blocks_on_device": "50"},
            Way(Recompute("some", 10), 50),
        ),
        ({"own_forward": False}, Way(Recompute("full"))),
    ]  # fmt: skip
    for changes, expected in cases:
        model = like(real, **changes)
        if "own_forward" in changes:
            model = step_model(tmp_path, torch.bfloat16, REAL, **changes)
        assert choose(model, SHAPE, usable_bytes(24 * GIB)).way == expected, changes
    # With room, blocks that stay are not recomputed.
    model = like(real, blocks_on_device="50")
    assert choose(model, SHAPE, 79 * GIB).way == Way(Recompute("some", 10), 50)


def test_streaming_comes_before_nothing_fits(real: StepModel) -> None:
    """1024 px in bf16 on 8 GB: 4.2 GiB with every block streamed."""
    model = real
    choice = choose(model, SHAPE, usable_bytes(8 * GIB))
    assert not choice.missing and choice.way.on_device == 8
    model = like(real, recompute="40")
    choice = choose(model, SHAPE, usable_bytes(8 * GIB))
    assert choice.way == Way(Recompute("some", 40)) and choice.missing
    tight = choose(real, SHAPE, 3 * GIB)
    line = too_small(real, SHAPE, tight)
    assert "with recompute full and 0 blocks on the device" in line
    assert "offload_activations: true" in line and "images of" in line


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_has_the_same_bytes(make_settings: MakeSettings, deep_model: Path) -> None:
    """bf16 with the table and float32 without, and continued with other blocks on the device."""
    model = {"pretrained_model_name_or_path": str(deep_model), "max_train_steps": 6}
    for precision in ("no", "bf16"):
        how = {**model, "mixed_precision": precision, "gradient_checkpointing": True}
        plain = train(make_settings(f"plain-{precision}", **how))
        for name, changes in {
            "some": {"blocks_on_device": "1"},
            "none": {"blocks_on_device": "0", "offload_activations": True},
        }.items():
            streamed = train(make_settings(f"{name}-{precision}", **how, **changes))
            assert streamed.lora.read_bytes() == plain.lora.read_bytes(), (name, precision)
    longer = {**how, "max_train_steps": 9}
    train(make_settings("plain-bf16", **longer, blocks_on_device="2"))
    train(make_settings("some-bf16", **longer))
    files = [
        make_settings(f"{name}-bf16").output_dir / "lora.safetensors" for name in ("plain", "some")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_says_what_is_streamed(
    make_settings: MakeSettings,
    train_shards: Path,
    deep_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of what a step with no block on the device takes, where the host has room and where not."""
    settings = make_settings(
        pretrained_model_name_or_path=str(deep_model), gradient_checkpointing=True
    )
    model = resolve_model(str(deep_model), ("transformer",))
    with ShardSet.open(train_shards) as shards:
        table = PlanTable.from_sets([shards])
    rule = BatchRule(2, 1, 0)
    largest = largest_load(bucket_loads(table, rule), model.family).largest(model.family)
    planner = StepModel(model, settings, torch.float32)
    peak = planner.cost(largest, Recompute("full"), 0).peak
    memory = (RESERVE + peak, 8 * GIB)
    for free, warned in ((None, False), (8 * GIB, False), (1, True)):
        monkeypatch.setattr(settle, "free_memory", lambda free=free: free)
        way = settle.settle_way(settings, model, table, rule, torch.device("cpu"), memory=memory)
        assert way == Way(Recompute("full"), 0)
        err = capsys.readouterr().err
        assert "the other blocks lie in 0.0" in err and "a micro-batch copies 0.0" in err
        assert ("of host memory and 0.00 GiB are free" in err) is warned
    found = free_memory()
    assert found is None or 1 << 20 < found < 1 << 50


def test_it_needs_the_own_forward_pass(train_shards: Path) -> None:
    for change in ("blocks_on_device=3", "offload_activations=true"):
        result = CliRunner().invoke(
            app, ["train", str(train_shards), "--set", change, "--set", "own_forward=false"]
        )
        assert result.exit_code == 2
        assert "own_forward: true" in result.stderr and result.stderr.count("\n") == 1


def test_plan_tells_blocks_traffic_and_time(
    make_settings: MakeSettings, deep_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_lora.train.cost import estimate

    row = {"base_precision": "bf16", "side": 512, "full": {"gib": 1.0, "card_gb": 8}}
    row["blocks_on_device"] = {"8": 3, "12": None, "16": 4}
    monkeypatch.setattr(estimate, "_table", lambda *_: [row])
    settings = make_settings(
        pretrained_model_name_or_path=str(deep_model),
        blocks_on_device="0",
        gradient_checkpointing=True,
    )
    facts = estimate.estimate(settings, tflops=1.0, h2d=1e-4)
    assert (facts["blocks"], facts["blocks_on_device"]) == (4, 0)
    copied = facts["copied_gib_per_step"]
    assert copied == pytest.approx(2 * 2 / 4 * facts["host_gib"], rel=1e-3)
    assert facts["floor_seconds_per_step"] == pytest.approx(copied * GIB / 1e5, rel=1e-3)
    fast = estimate.estimate(settings, tflops=1.0, h2d=1e4)
    assert fast["floor_seconds_per_step"] == pytest.approx(fast["flops_per_step"] / 1e12)
    text = estimate.format_estimate(facts)
    assert "0 of 4 blocks stay on the device" in text and "0.0001 GB/s (as given)" in text
    assert ["bf16", "512", "3", "-", "all"] in [line.split() for line in text.splitlines()]
