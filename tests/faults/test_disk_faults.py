"""A disk that is full, broken or read-only: an error, no partial file, no lost shard."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from fault_points import End, ForkServer, Point, fail_at, points_of, visible_files
from set_checks import check_run, check_set, temporaries
from test_kill_faults import KEEP, STEPS

pytestmark = pytest.mark.multiprocess
# Error -> whether all later calls of the kind fail too.
ERRORS = {"ENOSPC": True, "EIO": False, "EROFS": True}


def faults_of(points: list[Point]) -> list[tuple[Point, str]]:
    """Each write, fsync, rename, mkdir and creation of a file with each error."""
    return [
        (point, error)
        for point in points
        for error in ERRORS
        if point.changes
        and not point.call.startswith(("unlink", "rmdir"))
        and point.line not in ("unlink", "rmdir", "remove")
    ]


def check_error(end: End, error: str, what: str) -> None:
    """The job has ended with that very error: nothing is swallowed, nothing crashes otherwise."""
    assert end.code == 1, f"{what}: the error was lost: {end}"
    assert os.strerror(getattr(errno, error)) in end.message, f"{what}: {end.message}"
    assert end.kind in ("OSError", "QwenLoraError"), f"{what}: {end.kind}"


def fail_writes(server: ForkServer, place: Path, count: int | None, rng: random.Random) -> int:
    place.mkdir(exist_ok=True)
    faults = faults_of(points_of(server, "write_set", place / "unbroken"))
    unbroken = visible_files(place / "unbroken")
    chosen = faults if count is None else rng.sample(faults, count)
    for point, error in chosen:
        what = f"{error} at {point}"
        folder = place / "broken"
        end = fail_at(server, point, error, ERRORS[error], "write_set", folder)
        check_error(end, error, what)
        assert not temporaries(folder), f"{what}: the temporary stays"
        check_set(server, folder, unbroken, what)
        shutil.rmtree(folder, ignore_errors=True)
    return len(chosen)


def fail_saves(server: ForkServer, place: Path, count: int | None, rng: random.Random) -> int:
    for step in STEPS:
        server.run("save_checkpoints", place / f"only-{step}", steps=[step], keep=1)
    known = {
        f"step-{step:08d}": visible_files(place / f"only-{step}/checkpoints/step-{step:08d}")
        for step in STEPS
    }
    earlier, run = place / "earlier", place / "run"
    before = {"step-00000010", "step-00000020"}
    server.run("save_checkpoints", earlier, steps=STEPS[:2], keep=KEEP)
    shutil.copytree(earlier, run)
    facts = {"steps": STEPS, "keep": KEEP}
    faults = faults_of(points_of(server, "save_checkpoints", run, **facts))
    chosen = faults if count is None else rng.sample(faults, count)
    for point, error in chosen:
        shutil.rmtree(run)
        shutil.copytree(earlier, run)
        what = f"{error} at {point}"
        end = fail_at(server, point, error, ERRORS[error], "save_checkpoints", run, **facts)
        check_error(end, error, what)
        check_run(server, run, known, before, what, **facts)
    return len(chosen)


def test_a_disk_that_refuses_a_write_of_a_set(
    server: ForkServer, place: Path, rng: random.Random
) -> None:
    fail_writes(server, place, 12, rng)


@pytest.mark.slow
def test_a_disk_that_refuses_any_write_of_a_set(
    server: ForkServer, place: Path, rng: random.Random
) -> None:
    count = fail_writes(server, place, None, rng)
    assert count >= 150
    print(f"{count} disk errors in a three-shard write on {place}")


def test_a_disk_that_refuses_a_checkpoint(
    server: ForkServer, place: Path, rng: random.Random
) -> None:
    fail_saves(server, place, 8, rng)


@pytest.mark.slow
def test_a_disk_that_refuses_any_write_of_a_checkpoint(
    server: ForkServer, place: Path, rng: random.Random
) -> None:
    count = fail_saves(server, place, None, rng)
    assert count >= 30
    print(f"{count} disk errors in a checkpoint save on {place}")


def test_disk_errors_without_a_tracer(
    server: ForkServer, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "traces", False)
    assert fail_writes(server, tmp_path / "set", 6, rng) == 6
    assert fail_saves(server, tmp_path / "run", 6, rng) == 6
