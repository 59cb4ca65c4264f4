"""Properties of plans over random tables, batch rules and numbers of ranks."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from stand_in_sets import StandInSample, make_samples, make_set

from qwen_lora.train.plan import (
    LENGTH_CLASS_TOKENS,
    UNCONDITIONAL,
    BatchRule,
    EpochPlan,
    MicroBatch,
    PlanTable,
    plan_epoch,
    plan_id,
    share,
)

GOLDEN_HASH = "aa9d436e9b1315c799a50f54303e40c61009cfe7badf328463f160b72e8d55c6"
GOLDEN_ID = "1ed1bfcd50e23e100a4980a068eba965dd502f9e2fef99447b202d3cca32a398"

RULE = BatchRule(
    train_batch_size=4, micro_batches_per_step=3, seed=5, caption_dropout_rate=0.2, shuffle="full"
)


def random_case(number: int) -> tuple[PlanTable, BatchRule]:
    rng = random.Random(number)
    sets = [
        make_set(make_samples(rng.randrange(1, 120), seed=10 * number + k), per_shard=5)
        for k in range(rng.randrange(1, 4))
    ]
    weights = [rng.choice([1.0, 2.0, 0.5, 1.3]) for _ in sets]
    rule = BatchRule(
        train_batch_size=rng.randrange(1, 6),
        micro_batches_per_step=rng.choice([1, 2, 4, 8]),
        seed=rng.randrange(10**6),
        caption_dropout_rate=rng.choice([0.0, 0.1, 1.0]),
        shuffle=rng.choice(["full", "block"]),
        batch_pixels=rng.choice([0, 0, 5 * 64 * 64]),
    )
    return PlanTable.from_sets(sets, weights), rule


def all_batches(plan: EpochPlan) -> list[MicroBatch]:
    return [batch for step in range(plan.steps) for batch in plan.step(step)]


def visit_keys(table: PlanTable, plan: EpochPlan) -> list[tuple[str, int]]:
    return [(table.sample_id(int(r)), int(v)) for r, v in zip(plan.row, plan.visit, strict=True)]


@pytest.mark.parametrize("number", range(40))
def test_every_visit_once_in_whole_steps_of_one_bucket_each(number: int) -> None:
    table, rule = random_case(number)
    for epoch in (0, 1, 7):
        plan = plan_epoch(table, rule, epoch)
        counts = table.visits_before(rule.seed, epoch + 1) - table.visits_before(rule.seed, epoch)
        seen = Counter((v.row, v.visit) for batch in all_batches(plan) for v in batch.visits)
        assert seen == Counter({(r, v): 1 for r, n in enumerate(counts) for v in range(n)})

        sizes = [len(plan.step(step)) for step in range(plan.steps)]
        assert all(size == rule.micro_batches_per_step for size in sizes[:-1])
        assert not sizes or 1 <= sizes[-1] <= rule.micro_batches_per_step
        for batch in all_batches(plan):
            most = rule.batch_pixels // (batch.bucket[0] * batch.bucket[1])
            assert 1 <= len(batch.visits) <= max(rule.train_batch_size, most)
            for visit in batch.visits:
                assert tuple(table.bucket[visit.row]) == batch.bucket
                captions = table.token_offsets[visit.row + 1] - table.token_offsets[visit.row]
                assert visit.caption == UNCONDITIONAL or 0 <= visit.caption < captions


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_the_same_steps(number: int, world: int) -> None:
    table, rule = random_case(number)
    accumulation = 2
    rule = replace(rule, micro_batches_per_step=16)
    assert rule.micro_batches_per_step == 8 * accumulation  # so that every world divides it
    plan = plan_epoch(table, rule, 2)
    for step in range(plan.steps):
        whole = plan.step(step)
        parts = [share(whole, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert len(parts[0]) <= rule.micro_batches_per_step // world
        again = [None] * (len(parts[0]) * world)
        for rank, part in enumerate(parts):
            for j, batch in enumerate(part):
                again[j * world + rank] = batch
        assert again[: len(whole)] == whole
        assert all(batch is None for batch in again[len(whole) :])


def test_listing_order_sharding_and_sets_do_not_matter() -> None:
    samples = make_samples(150)
    plain = PlanTable.from_sets([make_set(samples)])
    shuffled = samples.copy()
    random.Random(1).shuffle(shuffled)
    others = [
        PlanTable.from_sets([make_set(shuffled, per_shard=50)]),
        PlanTable.from_sets([make_set(shuffled[:70]), make_set(shuffled[70:])]),
        PlanTable.from_sets([make_set(shuffled[60:]), make_set(shuffled[:90])]),
    ]
    for other in others:
        assert plan_id(other, RULE) == plan_id(plain, RULE)
        for epoch in range(3):
            assert plan_epoch(other, RULE, epoch).hash == plan_epoch(plain, RULE, epoch).hash


@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_samples_that_join_or_leave_do_not_reorder_the_others(weight: float) -> None:
    """With one sample a micro-batch the order of the plan is that of the keys."""
    rule = replace(RULE, train_batch_size=1)
    samples = make_samples(200)
    few = PlanTable.from_sets([make_set(samples[:120])], [weight])
    many = PlanTable.from_sets([make_set(samples[::-1])], [weight])
    for epoch in range(3):
        kept = visit_keys(few, plan_epoch(few, rule, epoch))
        wanted = set(kept)
        all_keys = visit_keys(many, plan_epoch(many, rule, epoch))
        assert [key for key in all_keys if key in wanted] == kept


def test_captions_and_dropout_stay_with_the_visit() -> None:
    samples = make_samples(200)
    few = PlanTable.from_sets([make_set(samples[:120])])
    many = PlanTable.from_sets([make_set(samples)])

    def drawn(table: PlanTable) -> dict[tuple[str, int], int]:
        plan = plan_epoch(table, RULE, 3)
        return dict(zip(visit_keys(table, plan), plan.caption.tolist(), strict=True))

    assert drawn(few).items() <= drawn(many).items()


def test_captions_are_drawn_evenly_and_dropped_at_the_rate() -> None:
    table = PlanTable.from_sets([make_set(make_samples(2000, tokens=(10, 20, 30)))])
    drawn = Counter(plan_epoch(table, RULE, 0).caption.tolist())
    assert drawn[UNCONDITIONAL] / 2000 == pytest.approx(0.2, abs=0.04)
    for caption in range(3):
        assert drawn[caption] / 2000 == pytest.approx(0.8 / 3, abs=0.05)
    never = replace(RULE, caption_dropout_rate=0.0)
    assert UNCONDITIONAL not in plan_epoch(table, never, 0).caption
    always = replace(RULE, caption_dropout_rate=1.0)
    assert set(plan_epoch(table, always, 0).caption) == {UNCONDITIONAL}


def test_micro_batches_have_near_equal_text() -> None:
    table = PlanTable.from_sets([make_set(make_samples(4000, bucket=(64, 64)))])
    plan = plan_epoch(table, RULE, 1)
    spreads = []
    for batch in all_batches(plan):
        tokens = [
            6
            if visit.caption == UNCONDITIONAL
            else int(table.token_counts[table.token_offsets[visit.row] + visit.caption])
            for visit in batch.visits
        ]
        spreads.append(max(tokens) - min(tokens))
    wide = sum(spread >= LENGTH_CLASS_TOKENS for spread in spreads)
    # only the micro-batches over the edge between two of the 400 / 64 + 1 classes
    assert wide <= 8
    assert max(spreads) < 2 * LENGTH_CLASS_TOKENS


def test_few_micro_batches_are_small() -> None:
    table = PlanTable.from_sets([make_set(make_samples(403))])
    plan = plan_epoch(table, RULE, 0)
    sizes: dict[tuple[int, int], list[int]] = {}
    for batch in all_batches(plan):
        sizes.setdefault(batch.bucket, []).append(len(batch.visits))
    for of_bucket in sizes.values():
        assert sum(size < 4 for size in of_bucket) <= 1


def test_small_buckets_get_more_samples_a_pass() -> None:
    """As many as have the pixels of one large image; never fewer than train_batch_size."""
    buckets = [(512, 512), (1024, 1024), (512, 768), (1328, 1328)]
    samples = [
        StandInSample(f"{k:032x}", bucket=buckets[k % 4], tokens=(20,)) for k in range(4 * 33)
    ]
    table = PlanTable.from_sets([make_set(samples)])
    rule = replace(RULE, train_batch_size=1, batch_pixels=1024 * 1024)
    sizes: dict[tuple[int, int], Counter[int]] = {}
    for batch in all_batches(plan_epoch(table, rule, 0)):
        sizes.setdefault(batch.bucket, Counter())[len(batch.visits)] += 1
    assert sizes == {
        (512, 512): {4: 8, 1: 1},
        (512, 768): {2: 16, 1: 1},
        (1024, 1024): {1: 33},
        (1328, 1328): {1: 33},
    }


def test_epochs_differ_in_order_and_company() -> None:
    table = PlanTable.from_sets([make_set(make_samples(200))])

    def companies(epoch: int) -> set[frozenset[int]]:
        batches = all_batches(plan_epoch(table, RULE, epoch))
        return {
            frozenset((a.row, b.row))
            for batch in batches
            for a in batch.visits
            for b in batch.visits
            if a.row < b.row
        }

    pairs = [companies(epoch) for epoch in range(6)]
    for one, two in zip(pairs, pairs[1:], strict=False):
        assert len(one & two) < 0.35 * len(one)
    hashes = {plan_epoch(table, RULE, epoch).hash for epoch in range(6)}
    assert len(hashes) == 6
    rows = [plan_epoch(table, RULE, epoch).row for epoch in range(2)]
    assert np.corrcoef(np.argsort(rows[0]), np.argsort(rows[1]))[0, 1] < 0.3


def test_block_shuffle_reads_few_shards_at_a_time() -> None:
    samples = make_samples(600)
    rule = replace(RULE, shuffle="block")
    table = PlanTable.from_sets([make_set(samples, per_shard=5)])  # 120 shards
    plan = plan_epoch(table, rule, 0)
    shard = table.shard_key[plan.row]
    window = [len(set(shard[start : start + 40].tolist())) for start in range(0, 560)]
    assert max(window) <= 2 * 16
    full = table.shard_key[plan_epoch(table, RULE, 0).row]
    assert len(set(full[:40].tolist())) > 24
    assert plan_epoch(table, rule, 1).hash != plan.hash


def test_the_hash_and_the_id_see_every_change() -> None:
    samples = make_samples(40)
    table = PlanTable.from_sets([make_set(samples)])
    changed_rules = [
        replace(RULE, train_batch_size=3),
        replace(RULE, micro_batches_per_step=4),
        replace(RULE, seed=6),
        replace(RULE, caption_dropout_rate=0.9),
        replace(RULE, batch_pixels=10**6),
        replace(RULE, shuffle="block"),
    ]
    ids = {plan_id(table, rule) for rule in [RULE, *changed_rules]}
    assert len(ids) == 7
    hashes = {plan_epoch(table, rule, 0).hash for rule in [RULE, *changed_rules[:5]]}
    assert len(hashes) == 6
    other_tables = [
        PlanTable.from_sets([make_set(samples[1:])]),
        PlanTable.from_sets([make_set([replace(samples[0], bucket=(32, 32)), *samples[1:]])]),
        PlanTable.from_sets([make_set([replace(samples[0], tokens=(401,)), *samples[1:]])]),
        PlanTable.from_sets([make_set(samples)], [2.0]),
    ]
    assert len({plan_id(other, RULE) for other in [table, *other_tables]}) == 5


def test_golden_plan() -> None:
    """A resumed run must plan as the run before it did, whatever the version of this code."""
    samples = [
        StandInSample(f"{k:032x}", bucket=(64, 64 + k % 2 * 32), tokens=(5 * k + 1, 300))
        for k in range(30)
    ]
    table = PlanTable.from_sets([make_set(samples)], [1.5])
    assert plan_epoch(table, RULE, 3).hash == GOLDEN_HASH
    assert plan_id(table, RULE) == GOLDEN_ID


def test_an_epoch_without_visits_has_no_steps() -> None:
    table = PlanTable.from_sets([make_set(make_samples(2))], [0.01])
    steps = [plan_epoch(table, RULE, epoch).steps for epoch in range(200)]
    assert steps.count(0) > 190
    assert sum(steps) == 4 or sum(steps) == 3  # two visits of each, one may share a step
    with pytest.raises(IndexError):
        plan_epoch(table, RULE, steps.index(0)).step(0)


def big_table(count: int) -> PlanTable:
    rng = np.random.default_rng(0)
    buckets = np.array([(1024 - 64 * k, 1024 + 64 * k) for k in range(-6, 7)], np.int32)
    words = rng.integers(0, 2**63, size=(count, 2), dtype=np.int64).astype(np.uint64)
    words = words[np.lexsort((words[:, 1], words[:, 0]))]
    return PlanTable(
        words=words,
        bucket=buckets[rng.integers(len(buckets), size=count)],
        weight=np.full(count, 1.0),
        token_offsets=np.arange(count + 1, dtype=np.int64),
        token_counts=rng.integers(5, 400, size=count, dtype=np.int32),
        unconditional_tokens=np.array([6], np.int32),
        set_index=np.zeros(count, np.int32),
        set_row=np.arange(count, dtype=np.int64),
        shard_key=rng.integers(0, 5000, size=count).astype(np.uint64),
    )


def test_a_hundred_thousand_samples_plan_quickly() -> None:
    table = big_table(100_000)
    start = time.process_time()
    plan = plan_epoch(table, RULE, 0)
    assert time.process_time() - start < 2
    assert len(plan.row) == 100_000
    assert len(set(plan.row.tolist())) == 100_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_a_million_samples_plan_in_five_seconds_and_a_gibibyte() -> None:
    table = big_table(1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    plan = plan_epoch(table, RULE, 0)
    plan_id(table, RULE)
    assert plan.hash
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20
