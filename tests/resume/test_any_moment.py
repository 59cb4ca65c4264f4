"""Signals and kill -9 at random moments of the whole command, start-up and saves included."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen_lora.train.checkpoint import CheckpointStore
from tests.resume.runs import (
    Runs,
    assert_same_end,
    check_boundary,
    discard,
    last_logged,
    newest_step,
    samples_of_steps,
)

pytestmark = pytest.mark.multiprocess
# A step of several micro-batches, so that a signal may come between two of them.
CHANGES: dict[str, Any] = {
    "gradient_accumulation_steps": 4,
    "train_batch_size": 1,
    "lora_dropout": 0.1,
    "logging_steps": 1,
    "max_train_steps": 10,
}


def unbroken_run(runs: Runs, place: Path, changes: dict[str, Any]) -> float:
    """Seconds that an undisturbed run takes, in place / "unbroken"."""
    started = time.monotonic()
    runs.run(place / "unbroken", changes)
    return time.monotonic() - started


def send_signals(runs: Runs, place: Path, count: int, rng: random.Random) -> Counter[str]:
    """Stop runs at random moments until `count` signals have come before the end."""
    changes = {**CHANGES, "checkpointing_steps": 100}
    whole = unbroken_run(runs, place, changes)
    sizes = samples_of_steps(place / "unbroken")
    folder, ends, said = place / "broken", Counter[str](), list[str]()
    while ends.total() - ends["finished"] < count:
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        delay = rng.uniform(0, whole)
        pid = runs.start(folder, changes)
        time.sleep(delay)
        os.kill(pid, number)
        end = runs.server.wait(pid)
        said.append(f"{number.name} after {delay:.3f} s")
        # Until training begins, and once it has ended, a signal does what it does to any process.
        ending = {0: "finished", -15: "at once", 143: "143", 130: "130"}.get(end.code)
        assert ending, f"exit code {end.code} {said}\n{end.log}"
        assert ending == "finished" or number == (signal.SIGINT if end.code == 130 else 15), said
        ends[ending] += 1
        if CheckpointStore(folder).steps():
            saved = check_boundary(folder, sizes)
            assert saved >= last_logged(folder), f"steps were lost: {said}"
        elif folder.exists():
            assert last_logged(folder) == 0, f"nothing was saved: {said}"
        if ending == "finished" or rng.random() < 0.25:
            runs.run(folder, changes)
            assert_same_end(place / "unbroken", folder, str(said))
            discard(folder)
            said.clear()
    return ends


def send_kills(runs: Runs, place: Path, count: int, rng: random.Random) -> int:
    """Kill runs at random moments `count` times; how many runs came to their end in between."""
    every = 2
    changes = {**CHANGES, "checkpointing_steps": every, "checkpoints_total_limit": 2}
    whole = unbroken_run(runs, place, changes)
    sizes = samples_of_steps(place / "unbroken")
    folder, kills, ends, said = place / "broken", 0, 0, list[str]()
    while kills < count:
        delay = rng.uniform(0, whole)
        before = newest_step(folder)
        pid = runs.start(folder, changes)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        code = runs.server.wait(pid).code
        said.append(f"killed after {delay:.3f} s")
        assert code in (0, -9), said
        kills += code == -9
        if CheckpointStore(folder).steps():
            check_boundary(folder, sizes)
        # The line of a step is written before its checkpoint, so that one may be missing.
        reached = max(last_logged(folder) - 1, 0) // every * every
        assert newest_step(folder) >= max(before, reached), f"a checkpoint was lost: {said}"
        if code == 0 or rng.random() < 0.25:
            runs.run(folder, changes)
            assert_same_end(place / "unbroken", folder, str(said))
            discard(folder)
            said.clear()
            ends += 1
    return ends


def test_six_signals_at_random_moments(runs: Runs, tmp_path: Path, rng: random.Random) -> None:
    send_signals(runs, tmp_path, 6, rng)


def test_four_kills_at_random_moments(runs: Runs, tmp_path: Path, rng: random.Random) -> None:
    send_kills(runs, tmp_path, 4, rng)


@pytest.mark.slow
def test_a_hundred_signals_at_random_moments(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    ends = send_signals(runs, tmp_path, 100, rng)
    print(f"signals at random moments, by how the run ended: {dict(ends)}; 0 steps lost")


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(runs: Runs, tmp_path: Path, rng: random.Random) -> None:
    ends = send_kills(runs, tmp_path, 100, rng)
    print(f"100 kills at random moments, {ends} runs to the end with the same bytes")
