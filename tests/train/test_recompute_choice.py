"""`recompute: auto`: the cheapest way that fits, at its boundaries, and what a run says of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_sets import MakeSettings
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.config.schema import Settings
from qwen_lora.families.base import Recompute
from qwen_lora.models import resolve_model
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.checkpoint import RunFacts
from qwen_lora.train.compiling import compiler_works, settle_compile
from qwen_lora.train.cost.choice import (
    GIB,
    RESERVE,
    blocks_that_fit,
    choice_of,
    choose,
    most_on_device,
    too_small,
    usable_bytes,
    what_fits,
)
from qwen_lora.train.cost.estimate import format_estimate, peaks_of
from qwen_lora.train.cost.rates import Rate, Rates
from qwen_lora.train.cost.settle import settle_way
from qwen_lora.train.cost.shapes import Shape, bucket_loads, largest_load
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.ways import Pace, Way
from qwen_lora.train.plan import BatchRule, plan_epoch
from qwen_lora.train.table import PlanTable
from tests.train.test_step_cost import REAL, like, small, step_model

SHAPE = Shape((128, 128), (256,))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> StepModel:
    """The real model; see `like` for other settings."""
    return step_model(tmp_path_factory.mktemp("real"), torch.bfloat16, REAL)


def peak(model: StepModel, way: str) -> int:
    return model.cost(SHAPE, Recompute.parse(way)).peak


@pytest.mark.filterwarnings("ignore")  # many, inside torch.compile
def test_what_is_offloaded_is_worth_its_copies(tmp_path: Path) -> None:
    """Of compiled blocks at 1024 px on 32 GB: the faster the copies, the more is kept; as many
    blocks' activations as fit stay; without a pace nothing but what full recomputation keeps."""
    changes = {"offload_activations": True, "compile_blocks": True, "blocks_on_device": "all"}
    model = step_model(tmp_path, torch.bfloat16, REAL, **changes)
    usable, rates = usable_bytes(32 * GIB), Rates(Rate(750e12, "given"), None)
    chosen = [
        choose(model, SHAPE, usable, Pace(rates, copies)) for copies in (1e9, 12e9, 25e9, 55e9)
    ]
    assert not any(choice.missing for choice in chosen)
    kept = [choice.recompute.budget(model.blocks) for choice in chosen]
    assert kept == sorted(kept) and kept[0] < kept[-1] and kept[-1] >= 0.4
    for choice in chosen:
        more = dataclasses.replace(choice.way, stay=choice.way.stay + 1)
        assert choice.way.stay == 57 or choice_of(model, SHAPE, more, usable).missing
        pace = Pace(rates, 55e9)
        assert pace.seconds(model, SHAPE, choice.way) >= pace.seconds(model, SHAPE, chosen[-1].way)
    slow = chosen[0]
    assert slow.cost.offloaded == (60 - 3 - slow.way.stay) * (
        model.compiled_bytes(SHAPE, slow.recompute) + model.input_bytes(SHAPE)
    )
    assert str(choose(model, SHAPE, usable).recompute) == "full"


@pytest.mark.filterwarnings("ignore")  # many, inside torch.compile
def test_streamed_weights_make_room_for_what_compiled_blocks_keep(tmp_path: Path) -> None:
    """At 1024 px on 20 GB: where copies are fast enough that it is worth it, and without a pace
    never."""
    model = step_model(tmp_path, torch.bfloat16, REAL, compile_blocks=True)
    usable, rates = usable_bytes(20 * GIB), Rates(Rate(200e12, "given"), None)
    most = most_on_device(model, SHAPE, Recompute("full"), usable)
    assert choose(model, SHAPE, usable).way == most.way
    for copies, trades in ((5e9, False), (100e9, True)):
        pace = Pace(rates, copies)
        choice = choose(model, SHAPE, usable, pace)
        assert not choice.missing and (choice.way != most.way) == trades
        share = pace.seconds(model, SHAPE, choice.way) / pace.seconds(model, SHAPE, most.way)
        assert share < 0.95 if trades else share == 1
        if trades:
            assert choice.way.on_device is not None and most.way.on_device is not None
            assert choice.way.on_device < most.way.on_device
            assert choice.recompute.budget(model.blocks) > 0


def test_each_way_is_chosen_down_to_its_last_byte(real: StepModel) -> None:
    """Of the real model at 1024 px: none, some blocks, full."""
    model = like(real, blocks_on_device="all")

    def chosen(usable: int) -> str:
        choice = choose(model, SHAPE, usable)
        assert choice.missing == max(0, choice.cost.peak - usable)
        assert bool(choice.missing) == (usable < peak(model, "full"))
        return str(choice.recompute)

    none, full = (peak(model, way) for way in ("none", "full"))
    assert none > full
    assert chosen(none) == "none"
    # Recomputing the first block alone frees nothing at the moment of the peak.
    assert chosen(none - 1) in ("1 blocks", "2 blocks")
    for blocks in (30, 45):
        some = peak(model, str(blocks))
        assert chosen(some) == f"{blocks} blocks"
        assert chosen(some - 1) == f"{blocks + 1} blocks"
    assert chosen(full) == chosen(full - 1) == "full"


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_compiled_blocks_share_the_memory_that_is_left(tmp_path: Path) -> None:
    """Of the real model: what torch's partitioner keeps under a few budgets. An H200 measured
    45.22 GiB at 1024 px with nothing recomputed, 31.34 GiB at 512 px."""
    model = step_model(tmp_path, torch.bfloat16, REAL, compile_blocks=True, rank=8)
    none = peak(model, "none")
    assert none == pytest.approx(45.22 * GIB, rel=0.015)
    at_512 = model.cost(Shape((64, 64), (256,)), Recompute("none"))
    assert at_512.peak == pytest.approx(31.34 * GIB, rel=0.015)

    chosen = [str(choose(model, SHAPE, none - down * GIB).recompute) for down in (0, 2, 10, 14, 17)]
    assert chosen == ["none", "30 blocks", "45 blocks", "54 blocks", "full"]
    for way in ("30", "45", "54"):
        cost = model.cost(SHAPE, Recompute.parse(way))
        assert peak(model, "full") < cost.peak < none
        assert model.cost(SHAPE, Recompute("none")).flops < cost.flops


def test_a_run_goes_on_as_it_was_compiled() -> None:
    settings = Settings()
    assert settings.compile_blocks == "auto"

    def settled(settings: Settings, **recorded: Any) -> Any:
        facts = RunFacts({}, "bfloat16", 1, "", (), (), "", **recorded) if recorded else None
        return settle_compile(settings, CPU, facts).compile_blocks

    assert settled(settings) is False  # on a CPU
    assert settled(settings, compiled=True) is True
    assert settled(settings, compiled=None) is False  # of an older version
    for fixed in (True, False):
        chosen = settings.model_copy(update={"compile_blocks": fixed})
        assert settled(chosen, compiled=not fixed) is fixed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_a_compiler_that_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiler_works(CPU)

    def broken(_: Any) -> Any:
        raise RuntimeError("no C\ncompiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert not compiler_works(CPU)
    said = capsys.readouterr().err
    assert said == "note: blocks run uncompiled, torch's compiler failed: no C compiler\n"


def test_a_resumed_run_keeps_what_its_compiled_blocks_recompute(tiny_model: Path) -> None:
    facts = RunFacts({}, "bfloat16", 1, "", (), (), "", compiled=True, recompute="5 blocks")
    model = resolve_model(str(tiny_model), ("transformer",))
    nothing: Any = None
    for wanted, expected in (("auto", "5 blocks"), ("full", "full")):
        settings = Settings(recompute=wanted, compile_blocks=True)
        found = settle_way(settings, model, nothing, nothing, CPU, facts)
        assert str(found.recompute) == expected and found.on_device is None
    streamed = dataclasses.replace(facts, blocks_on_device=0)
    for wanted, left in (("auto", 0), ("all", None), ("1", 1)):
        settings = Settings(blocks_on_device=wanted, compile_blocks=True)
        assert settle_way(settings, model, nothing, nothing, CPU, streamed).on_device == left


def test_named_ways_are_obeyed(tmp_path: Path) -> None:
    wanted: list[tuple[dict[str, Any], str]] = [
        ({"recompute": "selective"}, "selective"),
        ({"recompute": "2"}, "2 blocks"),
        ({"gradient_checkpointing": False}, "none"),
        ({"gradient_checkpointing": False, "recompute": "full"}, "none"),
        ({"own_forward": False}, "full"),
    ]
    for changes, expected in wanted:
        model = step_model(tmp_path, torch.bfloat16, small(), **changes)
        shape = Shape((8, 8), (5,))
        assert str(choose(model, shape, 10**12).recompute) == expected
    assert (
        str(choose(step_model(tmp_path, torch.bfloat16, small()), shape, None).recompute) == "full"
    )


def test_what_does_not_fit_says_what_would(real: StepModel, tmp_path: Path) -> None:
    """27.9 GiB in bf16 on a 24 GB card; nf4 takes 9 GiB."""
    model = like(real, blocks_on_device="all")
    choice = choose(model, SHAPE, usable_bytes(24 * GIB))
    line = too_small(model, SHAPE, choice)
    assert "\n" not in line and f"{choice.missing / GIB:.2f} GiB more" in line
    fitting = [f"base_precision: {precision}" for precision in ("fp8", "int8", "nf4")]
    stay = blocks_that_fit(model, choice.cost.peak, usable_bytes(24 * GIB))
    assert stay in (45, 46)
    assert line.endswith(
        f"would fit: blocks_on_device: {stay} with recompute: full, {', '.join(fitting)}"
    )
    two = Shape(SHAPE.latent_size, SHAPE.text_tokens * 2)
    few = step_model(tmp_path, torch.bfloat16, small())  # quickly traced
    usable = few.cost(SHAPE, Recompute("full")).peak
    assert what_fits(few, two, usable)[-2:] == ["train_batch_size: 1", "images of 512 x 512 px"]


def test_the_reserve() -> None:
    assert usable_bytes(8 * GIB) == 7 * GIB
    assert usable_bytes(80 * GIB) == 76 * GIB
    assert usable_bytes(80 * GIB, free=40 * GIB) == 36 * GIB


def test_sizes_between_are_interpolated(real: StepModel) -> None:
    """Of the real model; the others lie within 10 MiB of it."""
    model = real
    shapes = [Shape((side // 8, side // 8), (256,)) for side in (512, 1024, 1328)]
    for way in ("full", "none"):
        found = peaks_of(model, shapes, Recompute(way))
        assert found[1] == pytest.approx(model.cost(shapes[1], Recompute(way)).peak, abs=10 << 20)


# ---- which micro-batch is the largest ------------------------------------------------------------


@pytest.mark.parametrize("rule", [(1, 0, 0.0), (3, 0, 0.5), (2, 64 * 64 * 4, 0.1)])
def test_no_epoch_has_a_larger_micro_batch(
    train_shards: Path, rule: tuple[int, int, float]
) -> None:
    size, pixels, dropout = rule
    batches = BatchRule(size, 1, 5, caption_dropout_rate=dropout, batch_pixels=pixels)
    with ShardSet.open(train_shards) as shards:
        table = PlanTable.from_sets([shards])
    loads = {load.bucket: load for load in bucket_loads(table, batches)}
    assert sum(load.visits for load in loads.values()) == len(table)
    lengths = np.split(table.token_counts, table.token_offsets[1:-1])
    for epoch in range(8):
        plan = plan_epoch(table, batches, epoch)
        for number in range(plan.micro_batches):
            micro = plan.micro_batch(number)
            load = loads[micro.bucket]
            assert len(micro.visits) <= load.batch
            for visit in micro.visits:
                dropped = visit.caption < 0
                tokens = (
                    table.unconditional_tokens[0] if dropped else lengths[visit.row][visit.caption]
                )
                assert tokens <= load.longest
    from qwen_lora.families import family_by_name

    largest = largest_load([*loads.values()], family_by_name("qwen-image"))
    area = {bucket: load.batch * bucket[0] * bucket[1] for bucket, load in loads.items()}
    assert area[largest.bucket] == max(area.values())


# ---- a run ---------------------------------------------------------------------------------------


def settle(settings: Settings, train_shards: Path, memory: Any) -> Way:
    model = resolve_model(settings.pretrained_model_name_or_path or "", ("transformer",))
    with ShardSet.open(train_shards) as shards:
        table = PlanTable.from_sets([shards])
    return settle_way(settings, model, table, BatchRule(2, 1, 0), CPU, memory=memory)


def test_a_run_says_its_peak_and_its_choice(
    make_settings: MakeSettings, train_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(gradient_checkpointing=True)
    assert settle(settings, train_shards, (8 * GIB, 8 * GIB)) == Way(Recompute("none"))
    assert capsys.readouterr().err.startswith("recompute none: predicted peak 0.0")
    assert settle(settings, train_shards, (RESERVE, 8 * GIB)) == Way(Recompute("full"))
    err = capsys.readouterr().err
    assert "warning: the predicted peak is " in err and "would fit: " in err
    assert settle(settings, train_shards, None) == Way(Recompute("full"))  # a CPU
    assert capsys.readouterr().err == ""
    plain = make_settings(gradient_checkpointing=False)
    assert settle(plain, train_shards, None) == Way(Recompute("none"))


# ---- the command ---------------------------------------------------------------------------------


def test_plan_prints_text_and_json(
    train_shards: Path, transformer_only: Path, tmp_path: Path
) -> None:
    rows = [{"step": step, "loss": 1.0, "step_seconds": 0.5} for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 1.0001 GiB leave 0.1 MiB beside the reserve: too little.
    arguments = ["--tflops", "1e-4", "--memory", "1.0001", "--run", str(tmp_path), "--json"]
    model = ["--model", str(transformer_only)]
    result = CliRunner().invoke(app, ["plan", str(train_shards), *model, *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the predicted peak is ")
    facts = json.loads(result.stdout)
    assert facts["recompute"] == "full"
    parts = dict(facts["memory_gib"])
    assert parts.pop("peak") == pytest.approx(sum(parts.values()), abs=1e-5)
    assert facts["floor_seconds_per_step"] == pytest.approx(facts["flops_per_step"] / 1e8)
    assert facts["floor_seconds"] == pytest.approx(3000 * facts["floor_seconds_per_step"])
    assert {(row["base_precision"], row["side"]) for row in facts["table"]} == {
        (precision, side)
        for precision in ("bf16", "fp8", "int8", "nf4")
        for side in (512, 768, 1024, 1328)
    }
    assert facts["table"][0]["blocks_on_device"] == dict.fromkeys(("8", "12", "16", "24", "32"), 2)

    assert facts["run"]["share_of_floor"] == facts["floor_seconds_per_step"] / 0.5
    text = format_estimate(facts)
    assert "Arithmetic" in text and "recompute full" in text
    assert len([line for line in text.splitlines() if line.endswith(" GB")]) == 16


def test_plan_refuses_in_one_line(train_shards: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "none")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
