"""Runs that are broken off and go on, and what must be the same as in an unbroken one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import read_metrics
from tests.faults.fault_points import ForkServer

OF_THE_CLOCK = {"step_seconds", "samples_per_s", "data_wait_seconds", "peak_rss_gib"}
STARTED_S = 60.0

Settings = dict[str, Any]


class Runs:
    """Starts runs as children of a fork server; `base` are the settings that all have."""

    def __init__(self, server: ForkServer, base: Settings) -> None:
        self.server, self.base = server, base

    def start(self, folder: Path, changes: Settings, **arguments: Any) -> int:
        """The pid of a run that has reached the command."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = folder.with_name(f"{folder.name}.started")
        started.unlink(missing_ok=True)
        settings = {**self.base, **changes}
        pid = self.server.start("train_run", folder, settings=settings, **arguments)
        deadline = time.monotonic() + STARTED_S
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return pid

    def run(self, folder: Path, changes: Settings, expected: int = 0, **arguments: Any) -> str:
        """Run until the exit code `expected` (-9: killed); what was said."""
        end = self.server.wait(self.start(folder, changes, **arguments))
        assert end.code == expected, f"exit code {end.code}\n{end.log}"
        return end.log

    def chain(
        self,
        folder: Path,
        changes: Settings,
        rng: random.Random,
        *,
        interrupts: int = 5,
        workers: Callable[[random.Random], tuple[int, int]] | None = None,
        between: Callable[[], None] = lambda: None,
        world: int = 1,
    ) -> list[str]:
        """Interrupt a run so often at random steps, then let it end; what happened.

        workers: draws (read_ahead, threads) for each start. between: called before each resume.
        world: ranks, of which one gets the signal, which then is not kill -9.
        """
        last = {**self.base, **changes}["max_train_steps"]
        said = []
        for left in range(interrupts, 0, -1):
            done = newest_step(folder)
            signals = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
            signum = rng.choice(signals if world == 1 else signals[:2])
            # The steps that remain suffice for the interrupts that are left.
            step = rng.randint(done, min(last - 1 - left, done + 2 * (last - done) // (left + 1)))
            after = rng.random() < 0.5
            expected = -9 if signum == signal.SIGKILL else 128 + signum
            ahead, threads = (workers or any_workers)(rng)
            said.append(f"{signum.name} {'after' if after else 'before'} {step}, read {ahead}")
            self.run(
                folder,
                {**changes, "read_ahead": ahead},
                expected,
                stop={
                    "step": step,
                    "signum": int(signum),
                    "after": after,
                    "rank": rng.randrange(world),
                },
                threads=threads,
                world=world,
            )
            if signum != signal.SIGKILL:
                assert newest_step(folder) == step + 1, said
            between()
        ahead, threads = (workers or any_workers)(rng)
        self.run(folder, {**changes, "read_ahead": ahead}, threads=threads, world=world)
        return said


def any_workers(rng: random.Random) -> tuple[int, int]:
    """read_ahead and threads of the loader."""
    return rng.choice([0, 1, 9]), rng.choice([1, 2, 4])


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint, which must be sound; 0 if there is none."""
    store = CheckpointStore(folder)
    steps = store.steps()
    return store.load(steps[-1]).state.step if steps else 0


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock and the memory say."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in rows]


def last_logged(folder: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in timeless(folder)), default=0)


def result(folder: Path) -> dict[str, Any]:
    """What two runs must agree on: the LoRA file, the last checkpoint, pictures, and metrics."""
    last = CheckpointStore(folder).path(CheckpointStore(folder).steps()[-1])
    pictures = sorted((folder / "previews").rglob("*.png"))
    files = [folder / "lora.safetensors", *sorted(last.iterdir()), *pictures]
    named: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in files
    }
    return named | {"metrics": timeless(folder)}


def assert_same_end(unbroken: Path, broken: Path, what: str) -> None:
    expected, found = result(unbroken), result(broken)
    assert found.keys() == expected.keys(), what
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, f"{differing} of {broken} differ: {what}"


def check_boundary(folder: Path, samples_of_steps: list[int]) -> int:
    """The newest checkpoint lies between two optimizer steps: samples, optimizer and schedule have
    counted the same number of them. Returns it."""
    store = CheckpointStore(folder)
    checkpoint = store.load(store.steps()[-1])
    step = checkpoint.state.step
    assert checkpoint.state.samples == sum(samples_of_steps[:step])
    assert checkpoint.scheduler["last_epoch"] == step
    counted = {
        float(tensor)
        for name, tensor in checkpoint.optimizer_tensors.items()
        if name.endswith("/step")
    }
    assert counted == ({float(step)} if step else set())
    return step


def samples_of_steps(unbroken: Path) -> list[int]:
    """Of an unbroken run with logging_steps 1: how many samples each step had."""
    counts = [row["samples"] for row in timeless(unbroken) if "loss" in row]
    return [now - before for before, now in zip([0, *counts], counts, strict=False)]


def discard(folder: Path) -> None:
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def tally(said: list[str]) -> str:
    return json.dumps(Counter(line.split()[0] for line in said))
