"""Damaged shards: each is refused, or the damage lies outside every member; verify finds all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from mutations import KINDS, OURS, PLAIN, table, tally


def check(folder: Path, count: int, seed: int) -> None:
    counts, missed = tally(folder, count, seed)
    print(f"\nseed {seed}\n{table(counts)}")
    assert missed == []
    for kind in KINDS:
        assert counts[kind, "mutated"] == counts[kind, OURS[0]] + counts[kind, OURS[1]]
        assert counts[kind, "mutated"] == counts[kind, "found by verify"] >= count // len(KINDS)
    # The comparison is with a reader that works: it notices some, and loses others.
    assert sum(counts[kind, PLAIN[0]] for kind in KINDS)
    assert sum(counts[kind, PLAIN[1]] for kind in KINDS)


def test_400_mutated_shards(tmp_path: Path) -> None:
    check(tmp_path / "set", 400, random.randrange(1 << 40))


@pytest.mark.slow
def test_20000_mutated_shards(tmp_path: Path) -> None:
    check(tmp_path / "set", 20_000, 0)
