"""`qwen-lora precompute`, the whole command: killed anywhere, or on a disk that refuses."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_points import ForkServer, Point, fail_at, kill_at, points_of, visible_files
from set_checks import check_set, temporaries
from test_disk_faults import ERRORS, faults_of

pytestmark = pytest.mark.multiprocess
JOB = "precompute_set"


@pytest.fixture(scope="module")
def command(
    tiny_model: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkServer]:
    images = tmp_path_factory.mktemp("images")
    for path in sorted(image_folder.iterdir())[:12]:  # with captions: six
        shutil.copy(path, images)
    started = ForkServer(
        tmp_path_factory.mktemp("server"),
        ("warm_up_precompute",),
        FAULT_IMAGES=str(images),
        FAULT_MODEL=str(tiny_model),
    )
    yield started
    started.close()


def unbroken_run(server: ForkServer, place: Path) -> tuple[dict[str, bytes], list[Point]]:
    points = points_of(server, JOB, place / "unbroken")
    files = visible_files(place / "unbroken")
    assert len([name for name in files if name.endswith(".tar")]) == 3
    return files, points


def kill_runs(server: ForkServer, place: Path, count: int | None, rng: random.Random) -> int:
    unbroken, points = unbroken_run(server, place)
    chosen = points if count is None else rng.sample(points, count)
    for point in chosen:
        end = kill_at(server, point, JOB, place / "broken")
        assert end.code == -9, f"{point} was not reached: {end}"
        check_set(server, place / "broken", unbroken, f"killed at {point}", JOB)
        shutil.rmtree(place / "broken")
    return len(chosen)


def fail_runs(server: ForkServer, place: Path, count: int | None, rng: random.Random) -> int:
    unbroken, points = unbroken_run(server, place)
    faults = faults_of(points)
    chosen = faults if count is None else rng.sample(faults, count)
    for point, error in chosen:
        what, folder = f"{error} at {point}", place / "broken"
        end = fail_at(server, point, error, ERRORS[error], JOB, folder)
        assert (end.code, end.kind) == (1, "CommandFailed"), f"{what}: {end}"
        code, *lines = end.message.strip().splitlines()
        said = [line for line in lines if line.startswith("error: ")]
        assert code in "12" and len(said) == 1 and said[0] == lines[-1], f"{what}: {lines}"
        assert not temporaries(folder), f"{what}: the temporary stays"
        check_set(server, folder, unbroken, what, JOB)
        shutil.rmtree(folder, ignore_errors=True)
    return len(chosen)


def kill_at_random_times(
    server: ForkServer, place: Path, trials: int, rng: random.Random
) -> tuple[int, int]:
    """Runs with their writing thread, killed until one comes to its end; (kills, ends)."""
    started = time.monotonic()
    server.run(JOB, place / "unbroken", one_thread=False)
    whole = time.monotonic() - started
    unbroken, kills, ends = visible_files(place / "unbroken"), 0, 0
    folder = place / "broken"
    while kills < trials:
        delay = rng.uniform(0, whole)
        pid = server.start(JOB, folder, one_thread=False)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        code = server.wait(pid).code
        what = f"killed after {delay:.3f} s, kill {kills}"
        left = visible_files(folder) if folder.exists() else {}
        assert code in (0, -9) and left.items() <= unbroken.items(), what
        kills += code == -9
        if code == 0 or rng.random() < 0.3:  # otherwise the next one is killed in its debris
            check_set(server, folder, unbroken, what, JOB)
            shutil.rmtree(folder)
            ends += 1
    return kills, ends


@pytest.mark.slow
def test_kill_9_at_every_change(command: ForkServer, place: Path, rng: random.Random) -> None:
    count = kill_runs(command, place, None, rng)
    assert count >= 80
    print(f"{count} kills of `precompute` on {place}")


@pytest.mark.slow
def test_every_refused_write(command: ForkServer, place: Path, rng: random.Random) -> None:
    count = fail_runs(command, place, None, rng)
    assert count >= 200
    print(f"{count} disk errors in `precompute` on {place}")


@pytest.mark.slow
def test_a_hundred_kills_at_random_times(
    command: ForkServer, tmp_path: Path, rng: random.Random
) -> None:
    kills, ends = kill_at_random_times(command, tmp_path, 100, rng)
    print(f"{kills} kills at random times, {ends} runs to the end")
