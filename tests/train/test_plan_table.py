from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from stand_in_sets import StandInSample, make_samples, make_set

from qwen_lora.errors import InputError
from qwen_lora.train.table import PlanTable


def test_rows_are_sorted_and_point_into_their_sets() -> None:
    samples = make_samples(60)
    sets = [make_set(samples[:25]), make_set(samples[25:])]
    table = PlanTable.from_sets(sets)
    ids = [table.sample_id(row) for row in range(len(table))]
    assert ids == sorted(sample.sample_id for sample in samples)
    by_id = {sample.sample_id: sample for sample in samples}
    for row, name in enumerate(ids):
        home = sets[table.set_index[row]].table
        assert home.sample_id[table.set_row[row]] == name
        assert tuple(table.bucket[row]) == by_id[name].bucket
        tokens = table.token_counts[table.token_offsets[row] : table.token_offsets[row + 1]]
        assert tuple(tokens) == by_id[name].tokens
        shard = sets[table.set_index[row]].manifest.shards[home.shard[table.set_row[row]]]
        assert int(table.shard_key[row]) == int(shard.tar.sha256[:16], 16)
    assert table.unconditional_tokens.tolist() == [6, 6]


def test_the_first_set_with_a_sample_wins() -> None:
    samples = make_samples(30)
    sets = [make_set(samples[:20]), make_set(samples[10:])]
    table = PlanTable.from_sets(sets, [1.0, 3.0])
    assert len(table) == 30
    assert table.duplicates == 10
    for row in range(30):
        first = table.sample_id(row) in {sample.sample_id for sample in samples[:20]}
        assert table.set_index[row] == (0 if first else 1)
        assert table.weight[row] == (1.0 if first else 3.0)


def test_weights_of_sets_and_groups_multiply() -> None:
    samples = make_samples(10, group="cat") + make_samples(10, seed=1, group="dog")
    samples += make_samples(10, seed=2, group="old")
    table = PlanTable.from_sets([make_set(samples)], [2.0], {"cat": 1.5, "old": 0.0})
    group = {sample.sample_id: sample.group for sample in samples}
    weights = {group[table.sample_id(row)]: float(table.weight[row]) for row in range(len(table))}
    assert weights == {"cat": 3.0, "dog": 2.0}
    assert len(table) == 20


def test_kohya_groups_weigh_themselves() -> None:
    samples = make_samples(5, group="10_cat") + make_samples(5, seed=1, group="dog")
    sets = [make_set(samples)]
    assert set(PlanTable.from_sets(sets).weight) == {1.0}
    assert set(PlanTable.from_sets(sets, kohya_repeats=True).weight) == {10.0, 1.0}
    table = PlanTable.from_sets(sets, None, {"cat": 4.0}, kohya_repeats=True)
    assert set(table.weight) == {4.0, 1.0}


def test_hold_out_by_source() -> None:
    samples = make_samples(20)
    samples += [replace(sample, sample_id=sample.sample_id[::-1]) for sample in samples[:5]]
    held = frozenset(sample.source_sha256 for sample in samples[:5])
    sets = [make_set(samples)]
    training = PlanTable.from_sets(sets, exclude_sources=held)
    validation = PlanTable.from_sets(sets, only_sources=held)
    assert (len(training), len(validation)) == (15, 10)
    ids = [t.sample_id(row) for t in (training, validation) for row in range(len(t))]
    assert sorted(ids) == sorted(sample.sample_id for sample in samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "no shard set"),
        ((["a"], [1.0, 2.0]), "1 shard sets but 2 weights"),
        ((["a"], [0.0]), "not a number above 0"),
        ((["a"], [float("nan")]), "not a number above 0"),
        ((["a"], [1.0], {"a": -1.0}), "not a number >= 0"),
        ((["a"], [1.0], {"b": 1.0}), "'b', which no shard set has.*'a'"),
        ((["a"], [1.0], {"a": 0.0}), "no sample"),
        ((["a", "other family"], [1.0, 1.0]), "cannot be trained together: family"),
    ],
)
def test_mistakes_are_named(arguments, message: str) -> None:
    names, *rest = arguments
    sets = [
        make_set(make_samples(3, group="a"), family="other" if "other" in name else "qwen-image")
        for name in names
    ]
    with pytest.raises(InputError, match=message):
        PlanTable.from_sets(sets, *rest)


def test_an_empty_set_beside_a_full_one() -> None:
    table = PlanTable.from_sets([make_set([]), make_set(make_samples(3))])
    assert len(table) == 3
    assert set(table.set_index) == {1}


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.25, 1.6, 0.1])
def test_weight_is_the_mean_number_of_visits(weight: float) -> None:
    table = PlanTable.from_sets([make_set(make_samples(500))], [weight])
    counts = np.stack([table.visits_before(4, epoch) for epoch in range(21)])
    visits = np.diff(counts, axis=0)  # [epochs, samples]
    assert (counts[0] == 0).all()
    assert set(np.unique(visits)) <= {int(weight), int(np.ceil(weight))}
    # every epoch draws the extra visit with probability frac(w) over the samples: 4.5 sigma
    extra = weight - int(weight)
    spread = 4.5 * np.sqrt(500 * extra * (1 - extra)) + 1e-9
    assert (np.abs(visits.sum(axis=1) - 500 * weight) <= spread).all()
    # and every sample gets its share over the epochs, to less than one visit
    assert (np.abs(counts[20] - 20 * weight) < 1).all()


def test_visits_of_a_sample_do_not_depend_on_the_others() -> None:
    samples = make_samples(50)
    random.Random(0).shuffle(samples)
    whole = PlanTable.from_sets([make_set(samples)], [0.7])
    part = PlanTable.from_sets([make_set(samples[:20])], [0.7])
    rows = [row for row in range(50) if whole.sample_id(row) in {s.sample_id for s in samples[:20]}]
    for epoch in range(10):
        ours = whole.visits_before(1, epoch, np.array(rows))
        assert ours.tolist() == part.visits_before(1, epoch).tolist()


def test_captionless_samples_have_no_tokens() -> None:
    sample = StandInSample("ab" * 16, tokens=())
    table = PlanTable.from_sets([make_set([sample, *make_samples(3)])])
    row = next(row for row in range(4) if table.sample_id(row) == "ab" * 16)
    assert table.token_offsets[row] == table.token_offsets[row + 1]
