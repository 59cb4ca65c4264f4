"""kill -9 at every system call of a whole run that changes a file: the next start goes on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_points import Point, kill_at, points_of
from tests.resume.runs import Runs, assert_same_end, discard, last_logged, newest_step

pytestmark = pytest.mark.multiprocess
EVERY = 2


def of_the_run(point: Point) -> bool:
    """Not so the settings that the job writes beside the run."""
    return not any(name in point.line for name in ("-0.yaml", ".started"))


def is_temporary(path: Path) -> bool:
    return path.name.startswith((".new-", ".old-")) or path.name.endswith(".tmp")


def kill_everywhere(
    runs: Runs, shards: Path, place: Path, count: int | None, rng: random.Random
) -> int:
    """Kill runs at `count` of the points of an unbroken one (all: None); how many there were."""
    settings: dict[str, Any] = {
        **runs.base,
        "shards_dir": str(shards),
        "max_train_steps": 4,
        "checkpointing_steps": EVERY,
        "checkpoints_total_limit": 1,
        "logging_steps": 1,
        "preview_steps": 4,
        "preview_inference_steps": 2,
        "validation_steps": 2,
        "read_ahead": 0,  # in one thread the calls come in the same order each time
    }
    order = {"settings": settings, "threads": 1}
    unbroken, broken = place / "unbroken", place / "broken"
    points = points_of(runs.server, "train_run", unbroken, **order)
    points = [point for point in points if of_the_run(point)]
    for point in points if count is None else rng.sample(points, count):
        end = kill_at(runs.server, point, "train_run", broken, **order)
        what = f"killed at {point}"
        assert end.code == -9, f"{point} was not reached: {end}"
        # The line of a step is written before its checkpoint, so that one may be missing.
        assert newest_step(broken) >= max(last_logged(broken) - 1, 0) // EVERY * EVERY, what
        runs.run(broken, settings)
        assert_same_end(unbroken, broken, what)
        left = [path for path in broken.rglob("*") if is_temporary(path)]
        assert not left, f"{what}: {left} were left"
        discard(broken)
    return len(points)


def test_kill_9_at_some_writes_of_a_run(
    runs: Runs, sets: dict[str, Path], tmp_path: Path, rng: random.Random
) -> None:
    kill_everywhere(runs, sets["many-shards"], tmp_path, 2, rng)


@pytest.mark.slow
def test_kill_9_at_every_write_of_a_run(
    runs: Runs, sets: dict[str, Path], tmp_path: Path, rng: random.Random
) -> None:
    count = kill_everywhere(runs, sets["many-shards"], tmp_path, None, rng)
    assert count > (100 if runs.server.traces else 50)
    print(f"{count} kills, one at each change of the disk by a whole run: 0 differing bytes")
