"""kill -9 at every system call that changes a file: nothing half-made, nothing finished lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from fault_points import ForkServer, Point, kill_at, points_of, visible_files
from set_checks import check_run, check_set

pytestmark = pytest.mark.multiprocess
STEPS, KEEP = [10, 20, 30], 2


def kill_writes(server: ForkServer, place: Path, count: int | None, rng: random.Random) -> int:
    """Kill the writing of a set at `count` of its points (all: None); how many there were."""
    place.mkdir(exist_ok=True)
    points = points_of(server, "write_set", place / "unbroken")
    unbroken = visible_files(place / "unbroken")
    assert len(unbroken) == 3 * 2 + 5  # shards; manifest twice, unconditional, rgb, retired
    chosen = points if count is None else rng.sample(points, count)
    for point in chosen:
        end = kill_at(server, point, "write_set", place / "broken")
        assert end.code == -9, f"{point} was not reached: {end}"
        check_set(server, place / "broken", unbroken, f"killed at {point}")
        shutil.rmtree(place / "broken")
    return len(chosen)


def kill_saves(server: ForkServer, place: Path, chosen: Sequence[Point] | None = None) -> int:
    """Kill the third save of a run that keeps two checkpoints, at each of its points."""
    for step in STEPS:
        server.run("save_checkpoints", place / f"only-{step}", steps=[step], keep=1)
    known = {
        f"step-{step:08d}": visible_files(place / f"only-{step}/checkpoints/step-{step:08d}")
        for step in STEPS
    }
    earlier, before = place / "earlier", {"step-00000010", "step-00000020"}
    server.run("save_checkpoints", earlier, steps=STEPS[:2], keep=KEEP)
    shutil.copytree(earlier, place / "run")
    facts = {"steps": STEPS, "keep": KEEP}
    points = points_of(server, "save_checkpoints", place / "run", **facts)
    for point in points if chosen is None else chosen:
        shutil.rmtree(place / "run")
        shutil.copytree(earlier, place / "run")
        end = kill_at(server, point, "save_checkpoints", place / "run", **facts)
        assert end.code == -9, f"{point} was not reached: {end}"
        check_run(server, place / "run", known, before, f"killed at {point}", **facts)
    return len(points)


def test_kill_9_at_changes_of_a_set_being_written(
    server: ForkServer, place: Path, rng: random.Random
) -> None:
    kill_writes(server, place, 12, rng)


@pytest.mark.slow
def test_kill_9_at_every_change_of_a_set_being_written(
    server: ForkServer, place: Path, rng: random.Random
) -> None:
    count = kill_writes(server, place, None, rng)
    assert count >= (70 if server.traces else 50)
    print(f"{count} kills of a three-shard write on {place}")


def test_kill_9_at_every_change_of_a_checkpoint_save(server: ForkServer, place: Path) -> None:
    count = kill_saves(server, place)
    assert count >= 15
    print(f"{count} kills of a checkpoint save on {place}")


def test_kill_9_without_a_tracer(
    server: ForkServer, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "traces", False)
    assert kill_writes(server, tmp_path / "set", 6, rng) == 6
    assert kill_saves(server, tmp_path / "run") >= 15


@pytest.mark.slow
def test_kill_9_at_every_change_without_a_tracer(
    server: ForkServer, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "traces", False)
    count = kill_writes(server, tmp_path, None, rng)
    assert count >= 50
    print(f"{count} kills of a three-shard write, in-process")
