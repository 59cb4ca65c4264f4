"""Random shard sets, weights, batch rules and rank counts: ranks that never disagree."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from random_sets import random_set
from stand_in_sets import make_samples, make_set

from qwen_lora.errors import InputError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.plan import BatchRule, MicroBatch, PlanTable, plan_epoch, plan_id, share

GROUPS = ("", "cat", "3_dog", "10_fox")


@dataclass
class Case:
    """What a run could be made of."""

    sets: list[Any]
    weights: list[float]
    group_weights: dict[str, float]
    kohya_repeats: bool
    rule: BatchRule
    epochs: tuple[int, ...]

    def table(self, sets: list[Any], held_out: frozenset[str] = frozenset()) -> PlanTable:
        return PlanTable.from_sets(
            sets, self.weights, self.group_weights, held_out, kohya_repeats=self.kohya_repeats
        )


def random_case(rng: random.Random, sets: list[Any]) -> Case:
    held = sorted(set().union(*(set(one.table.group) for one in sets)))
    return Case(
        sets=sets,
        weights=[rng.choice([1.0, 2.0, 0.5, 1.3, 0.02]) for _ in sets],
        group_weights={group: rng.choice([0.5, 2.0]) for group in held if rng.random() < 0.3},
        kohya_repeats=rng.random() < 0.5,
        rule=BatchRule(
            train_batch_size=rng.randint(1, 6),
            micro_batches_per_step=rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24]),
            seed=rng.randrange(2**63),
            caption_dropout_rate=rng.choice([0.0, 0.1, 1.0]),
            shuffle=rng.choice(["full", "block"]),
            batch_pixels=rng.choice([0, 0, 10_000]),
        ),
        epochs=(0, rng.randrange(1, 10), rng.randrange(10, 10**6)),
    )


def stand_ins(rng: random.Random) -> list[Any]:
    """One to three sets; some samples are in several."""
    sets = []
    for _ in range(rng.randint(1, 3)):
        samples = [
            sample
            for seed in (rng.randrange(3), rng.randrange(10**6))
            for sample in make_samples(rng.randint(1, 60), seed=seed, group=rng.choice(GROUPS))
        ]
        rng.shuffle(samples)
        sets.append(make_set(samples, per_shard=rng.randint(1, 30)))
    return sets


def written(rng: random.Random, folder: Path) -> list[Path]:
    """The same on the disk."""
    return [
        random_set(
            folder / str(number),
            rng.randint(1, 20),
            per_shard=rng.randint(1, 7),
            groups=rng.sample(GROUPS, rng.randint(1, 3)),
            first=rng.randrange(30),
        )
        for number in range(rng.randint(1, 3))
    ]


def check_epoch(table: PlanTable, rule: BatchRule, epoch: int, worlds: list[int]) -> Counter[str]:
    """Each visit exactly once, and every number of ranks runs the same steps; what was seen."""
    plan = plan_epoch(table, rule, epoch)
    due = table.visits_before(rule.seed, epoch + 1) - table.visits_before(rule.seed, epoch)
    steps = [plan.step(number) for number in range(plan.steps)]
    seen = Counter((v.row, v.visit) for step in steps for one in step for v in one.visits)
    assert seen == Counter({(row, n): 1 for row, count in enumerate(due) for n in range(count)})
    idle = 0
    for world in worlds:
        for step in steps:
            shares = [share(step, rank, world) for rank in range(world)]
            # Equally many, so that no rank waits for another, and none without need.
            assert {len(mine) for mine in shares} == {-(-len(step) // world)}
            again: list[MicroBatch | None] = [
                mine[j] for j in range(len(shares[0])) for mine in shares
            ]
            assert again[: len(step)] == step and not any(again[len(step) :])
            idle += len(again) - len(step)
    return Counter(epochs=1, steps=len(steps), visits=len(seen), idle=idle)


def check_case(case: Case, rng: random.Random) -> Counter[str]:
    sources = sorted(set().union(*(set(one.table.source_sha256) for one in case.sets)))
    held_out = frozenset(rng.sample(sources, rng.randrange(len(sources))))
    try:
        table = case.table(case.sets, held_out)
    except InputError as error:
        assert "no sample to train on" in str(error)  # all that is left is of a group held out
        return Counter(refused=1)
    assert not held_out & {
        case.sets[index].table.source_sha256[row]
        for index, row in zip(table.set_index, table.set_row, strict=True)
    }
    worlds = [world for world in (1, 2, 4, 8) if not case.rule.micro_batches_per_step % world]
    total = Counter(plans=1, ranks=sum(worlds), duplicates=table.duplicates)
    for epoch in case.epochs:
        total += check_epoch(table, case.rule, epoch, worlds)
    again = case.table(case.sets, held_out)
    assert plan_id(again, case.rule) == plan_id(table, case.rule)
    hashes = [plan_epoch(one, case.rule, case.epochs[1]).hash for one in (table, again)]
    assert hashes[0] == hashes[1]
    return total


def check_many(stand_in: int, real: int, rng: random.Random, scratch: Path) -> Counter[str]:
    total = Counter[str]()
    for _ in range(stand_in):
        total += check_case(random_case(rng, stand_ins(rng)), rng)
    for _ in range(real):
        with ExitStack() as stack:
            sets = [
                stack.enter_context(ShardSet.open(path)) for path in written(rng, scratch / "sets")
            ]
            total += check_case(random_case(rng, sets), rng) + Counter(on_disk=1)
        shutil.rmtree(scratch / "sets")
    return total


def test_random_sets_rules_and_ranks(tmp_path: Path, fault_seed: int) -> None:
    total = check_many(60, 10, random.Random(fault_seed), tmp_path)
    assert total["idle"] and total["duplicates"] and total["plans"] > 50


@pytest.mark.slow
def test_a_thousand_random_sets_rules_and_ranks(tmp_path: Path, fault_seed: int) -> None:
    total = check_many(700, 300, random.Random(fault_seed), tmp_path)
    print(f"1,000 random cases, {dict(total)}: every visit once, ranks equal in every step")
