"""1, 2, 4 and 8 ranks, in any order: the same samples, captions, noise and noise levels."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.checkpoint import TrainState
from qwen_lora.train.data import BatchLoader, LoadedBatch
from qwen_lora.train.loop import upcoming
from qwen_lora.train.plan import BatchRule, PlanTable
from qwen_lora.train.timesteps import TimestepSampling
from tests.resume.runs import Runs, any_workers, discard, newest_step, timeless

WORLDS = (1, 2, 4, 8)
STEPS = 12
RULE = BatchRule(train_batch_size=2, micro_batches_per_step=8, seed=3, caption_dropout_rate=0.3)
Step = dict[int, LoadedBatch]  # by the micro-batch's number in the step


class Source:
    """Loads the steps of a run over two sets, one with posteriors and one of repeated samples."""

    def __init__(self, sets: list[ShardSet]) -> None:
        self.sets, self.table = sets, PlanTable.from_sets(sets, [1.5, 2.0])
        self.plans = self.loader(0, 1)

    def loader(self, read_ahead: int, threads: int) -> BatchLoader:
        return BatchLoader(
            self.sets,
            self.table,
            RULE,
            TimestepSampling(density="logit_normal"),
            read_ahead=read_ahead,
            threads=threads,
        )

    def state(self, step: int) -> TrainState:
        """The cursor after `step` steps, as the loop counts it."""
        epoch = 0
        while step >= (steps := self.plans.plan(epoch).steps):
            step, epoch = step - steps, epoch + 1
        return TrainState(epoch=epoch, epoch_step=step)

    def steps(self, first: int, last: int, world: int, rng: random.Random) -> list[Step]:
        """What all ranks together train on, each with its own read-ahead and threads."""
        streams = []
        for rank in range(world):
            loader = self.loader(*any_workers(rng))
            ranks = SimpleNamespace(rank=rank, world=world)
            parts: Any = SimpleNamespace(loader=loader, ranks=ranks)
            streams.append(upcoming(parts, self.state(first)))
        gathered = []
        for _ in range(first, last):
            works = [next(stream) for stream in streams]
            assert len({len(work.micro_steps) for work in works}) == 1
            micro_steps = [micro for work in works for micro in work.micro_steps]
            with_weight = [micro for micro in micro_steps if micro.weight]
            assert sum(micro.batch.size for micro in with_weight) == works[0].samples
            numbers = [micro.index for micro in with_weight]
            assert sorted(numbers) == list(range(len(numbers)))  # none lost, none twice
            gathered.append({micro.index: micro.batch for micro in with_weight})
        for stream in streams:
            stream.close()
        return gathered


@pytest.fixture(scope="module")
def source(sets: dict[str, Path]) -> Iterator[Source]:
    opened = [ShardSet.open(sets[name]) for name in ("plain", "many-shards")]
    yield Source(opened)
    for one in opened:
        one.close()


def assert_same_steps(expected: list[Step], found: list[Step], what: str) -> int:
    """To the last bit of every tensor; the number of micro-batches."""
    assert len(expected) == len(found)
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.keys() == theirs.keys(), what
        for number, batch in ours.items():
            other = theirs[number]
            assert other.sample_ids == batch.sample_ids, what
            for one, two in zip(tensors(batch), tensors(other), strict=True):
                assert one.dtype == two.dtype and torch.equal(one, two), what
    return sum(len(step) for step in expected)


def tensors(batch: LoadedBatch) -> list[torch.Tensor]:
    return [batch.latents, batch.noise, batch.sigmas, *batch.prompt_embeds, *batch.prompt_masks]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_together_are_one_rank(source: Source, rng: random.Random, world: int) -> None:
    expected = source.steps(0, STEPS, 1, rng)
    assert source.state(STEPS).epoch >= 2
    assert_same_steps(expected, source.steps(0, STEPS, world, rng), f"{world} ranks")


def resume_everywhere(source: Source, cuts: int, rng: random.Random) -> str:
    """All ordered pairs of rank counts, each cut at `cuts` random steps; a count."""
    expected, micro_batches = source.steps(0, STEPS, 1, rng), 0
    for before, after in product(WORLDS, WORLDS):
        for cut in rng.sample(range(1, STEPS), cuts):
            what = f"{before} ranks until step {cut}, then {after}"
            found = source.steps(0, cut, before, rng) + source.steps(cut, STEPS, after, rng)
            micro_batches += assert_same_steps(expected, found, what)
    return (
        f"{len(WORLDS) ** 2} ordered pairs of rank counts x {cuts} cuts, {micro_batches} "
        "micro-batches: 0 lost, 0 twice, 0 reordered, 0 tensors changed"
    )


def test_resuming_with_any_number_of_ranks(source: Source, rng: random.Random) -> None:
    resume_everywhere(source, 1, rng)


@pytest.mark.slow
def test_resuming_with_any_number_of_ranks_at_ten_places(
    source: Source, rng: random.Random
) -> None:
    print(resume_everywhere(source, 10, rng))


# ---- real ranks ------------------------------------------------------------------------------

MICRO_BATCHES = 8  # of a step
TRAINED = {
    "train_batch_size": 1,
    "learning_rate": 1e-4,
    "lora_dropout": 0.1,
    "logging_steps": 1,
    "checkpointing_steps": 100,
}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in timeless(folder) if "loss" in row]


def change_ranks(
    runs: Runs, place: Path, worlds: list[int], each: int, rng: random.Random
) -> float:
    """Train with each of `worlds` in turn, stopped by SIGTERM to any one rank after about `each`
    steps; the largest relative difference of a step's loss from an unbroken run of one rank."""
    steps = each * len(worlds)
    trained = {**TRAINED, "max_train_steps": steps}
    if not (place / "unbroken").exists():
        alone = {**trained, "gradient_accumulation_steps": MICRO_BATCHES}
        runs.run(place / "unbroken", alone)
    # What the first start fixes stays: later ones accumulate as many as their ranks leave.
    changes = {**trained, "gradient_accumulation_steps": MICRO_BATCHES // worlds[0]}
    folder = place / "ranks"
    for number, world in enumerate(worlds[:-1], 1):
        step = number * each - rng.randint(1, each)
        stop = {"step": step, "signum": int(signal.SIGTERM), "rank": rng.randrange(world)}
        runs.run(folder, changes, 143, stop=stop, world=world)
        assert newest_step(folder) == step + 1
    runs.run(folder, changes, world=worlds[-1])
    expected, found = losses(place / "unbroken"), losses(folder)
    assert len(found) == len(expected) == steps
    differences = [abs(b - a) / abs(a) for a, b in zip(expected, found, strict=True)]
    assert max(differences) <= 1e-5, f"{worlds}: {differences}"
    ends = [newest_step(place / name) for name in ("unbroken", "ranks")]
    assert ends == [steps, steps]
    discard(folder)
    return max(differences)


@pytest.mark.multiprocess
def test_one_two_four_one(runs: Runs, tmp_path: Path, rng: random.Random) -> None:
    change_ranks(runs, tmp_path, [1, 2, 4, 1], 3, rng)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_many_changes_of_ranks(runs: Runs, tmp_path: Path, rng: random.Random) -> None:
    chains = [[1, 2, 4, 1], [8, 1, 4, 2], [2, 8, 1, 8], *(rng.sample(WORLDS, 4) for _ in range(3))]
    worst = max(change_ranks(runs, tmp_path, worlds, 8, rng) for worlds in chains)
    print(f"{chains}: loss of each of 32 steps within {worst:.1e} relative of one rank's")
