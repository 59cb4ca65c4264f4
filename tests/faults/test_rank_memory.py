"""`oom_fallback` on several processes: one of them runs out of memory and goes on with less by
itself. Gradients leave a process only after its whole pass, so the others just wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_runs import Ranks, RankServer, Run

from qwen_lora.train.metrics import read_metrics
from tests.faults.test_rank_faults import PROMISED_S, result
from tests.train.random_sets import random_map, random_prompts, random_set

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch"),
]
FALLBACK = {"oom_fallback": "true", "lora_dropout": 0.2, "preview_steps": 0}
PASSES = {
    "validation": {"validation_steps": 2},
    "preview": {"preview_steps": 2, "preview_inference_steps": 2},
}
OUT = "out of GPU memory with recompute none; going on with recompute "
MakeRanks = Callable[..., Ranks]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what previews need."""
    folder = tmp_path_factory.mktemp("rank-memory") / "shards"
    prompts = random_prompts(["a fox", "two", "three"])
    return random_set(folder, 13, per_shard=2, rgb=random_map(), prompts=prompts)


@pytest.fixture
def ranks_in(
    rank_server: RankServer, shards: Path, transformer_only: Path, tmp_path: Path
) -> MakeRanks:
    def make(name: str, world: int, model: Path = transformer_only) -> Ranks:
        folder = tmp_path / name
        folder.mkdir()
        return Ranks(rank_server, folder, shards, model, world)

    return make


@pytest.fixture
def unbroken(ranks_in: MakeRanks) -> Callable[[int], dict[str, bytes]]:
    def make(world: int) -> dict[str, bytes]:
        ranks = ranks_in(f"unbroken-{world}", world)
        run = ranks.train(settings=FALLBACK)
        assert run.codes == [0] * world, run
        return result(ranks.output)

    return make


def check_done_again(
    run: Run, failing: int, step: int, files: dict[str, bytes], ranks: Ranks
) -> None:
    """That rank alone, once; all end with the bytes of an undisturbed run."""
    assert run.codes == [0] * ranks.world, run
    said = [log.count(OUT) for log in run.logs]
    assert said == [int(rank == failing) for rank in range(ranks.world)], run
    assert f"process {failing}: step {step}: {OUT}" in run.logs[failing], run
    assert result(ranks.output) == files, run


def test_one_rank_does_its_step_again(
    ranks_in: MakeRanks, unbroken: Callable[[int], dict[str, bytes]]
) -> None:
    """Late in a step: the other one is already waiting with its gradients."""
    ranks = ranks_in("one", 2)
    run = ranks.train("no GPU memory, backward", 1, -3, settings=FALLBACK)
    check_done_again(run, 1, 3, unbroken(2), ranks)


def test_a_rank_with_no_way_left_ends_all(ranks_in: MakeRanks) -> None:
    ranks = ranks_in("none-left", 2)
    run = ranks.train("no GPU memory any more", 1, 5, settings=FALLBACK)
    assert run.codes == [1, 1], run
    assert run.errors[0] == run.errors[1] and len(run.errors[0]) == 1, run
    assert "step 3: the GPU's memory is too small for a micro-batch" in run.errors[0][0]
    assert not any("Traceback" in log for log in run.logs), run
    assert OUT not in run.logs[0] and OUT in run.logs[1], run
    assert run.seconds < 3 * PROMISED_S, run


@pytest.mark.parametrize("what", ["validation", pytest.param("preview", marks=pytest.mark.slow)])
def test_a_pass_without_gradients_that_does_not_fit_one_rank(
    what: str, ranks_in: MakeRanks
) -> None:
    """A model of two blocks, which cannot be streamed: all end with its error."""
    ranks = ranks_in(what, 2)
    run = ranks.train(f"no GPU memory, {what}", 1, 3, settings=FALLBACK | PASSES[what])
    assert run.codes == [1, 1], run
    assert run.errors[0] == run.errors[1] and len(run.errors[0]) == 1, run
    assert "the GPU's memory is too small for " in run.errors[0][0]
    assert not any("Traceback" in log for log in run.logs), run
    assert run.seconds < 3 * PROMISED_S, run


@pytest.mark.slow
@pytest.mark.parametrize("what", PASSES)
def test_one_rank_streams_blocks_for_a_pass(
    what: str, ranks_in: MakeRanks, deep_model: Path
) -> None:
    runs = {}
    for name, fault in (("plain", "none"), ("short", f"no GPU memory, {what}")):
        ranks = ranks_in(name, 2, deep_model)
        run = ranks.train(fault, 1, 3, settings=FALLBACK | PASSES[what])
        assert run.codes == [0, 0], run
        rows = [row for row in read_metrics(ranks.output / "metrics.jsonl") if "epoch" in row]
        measured = [row for row in rows if "fixed_train_loss" in row]
        pictures = {p.parent.name + p.name: p.read_bytes() for p in ranks.output.rglob("0*.png")}
        assert measured if what == "validation" else pictures
        runs[name] = result(ranks.output), measured, pictures
    assert "out of GPU memory" not in run.logs[0]
    assert run.logs[1].count("going on with recompute 3 blocks and 1 blocks on the device") == 1
    assert runs["plain"] == runs["short"]


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        pytest.param("optimizer's state", "the optimizer's state", marks=pytest.mark.slow),
        ("update", "the optimizer in step 3"),
    ],
)
def test_an_optimizer_that_does_not_fit_one_rank(
    fault: str, what: str, ranks_in: MakeRanks, deep_model: Path
) -> None:
    """That one streams blocks, and the others need not know: an update follows the last exchange of
    a step. Without the fallback all end with its error."""
    files = {}
    number = 3 if fault == "update" else 1
    for name, strikes in (("plain", "none"), ("short", f"no GPU memory, {fault}")):
        ranks = ranks_in(name, 2, deep_model)
        run = ranks.train(strikes, 1, number, settings=FALLBACK)
        assert run.codes == [0, 0], run
        files[name] = result(ranks.output)
    said = f"process 1: {what}: out of GPU memory with recompute none; going on with recompute "
    assert said in run.logs[1] and "out of GPU memory" not in run.logs[0], run
    assert files["plain"] == files["short"]

    ranks = ranks_in("ends", 2, deep_model)
    run = ranks.train(f"no GPU memory, {fault}", 1, number, settings={"preview_steps": 0})
    assert run.codes == [1, 1], run
    assert run.errors[0] == run.errors[1] and len(run.errors[0]) == 1, run
    assert f"the GPU's memory is too small for {what} with recompute none" in run.errors[0][0]
    assert not any("Traceback" in log for log in run.logs), run


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_rank_at_each_moment(
    world: int, ranks_in: MakeRanks, unbroken: Callable[[int], dict[str, bytes]]
) -> None:
    """Forward and backward, in the first and the last micro-batch of a step."""
    files = unbroken(world)
    for rank in range(world):
        for number in (1, 3, -3, -6):
            for where in ("forward", "backward"):
                ranks = ranks_in(f"{rank}{number}{where}", world)
                run = ranks.train(f"no GPU memory, {where}", rank, number, settings=FALLBACK)
                check_done_again(run, rank, abs(number), files, ranks)
