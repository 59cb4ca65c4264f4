"""Two launchers as on two machines, by torchrun and accelerate launch, in fresh processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qwen_lora.train.checkpoint import CheckpointStore
from tests.ranks.launchers import LAUNCHERS, Launcher, finish, logs, start, workers
from tests.ranks.machines import Machines, distance, settled, train_argv
from tests.ranks.test_nodes import precompute_argv, visible
from tests.s3_server import BUCKET, S3Server, s3_stand_in

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
KINDS = list(LAUNCHERS)


@pytest.fixture
def folders(
    tmp_path: Path, shards: Path, tiny_model: Path, image_folder: Path
) -> Iterator[Sequence[Path]]:
    """Two machines' folders, each with its own model, shards and images."""
    made = [tmp_path / f"node-{node}" for node in (0, 1)]
    for folder in made:
        shutil.copytree(shards, folder / "shards")
        shutil.copytree(tiny_model, folder / "model")
        shutil.copytree(image_folder, folder / "images")
    yield made


@pytest.fixture
def launched() -> Iterator[Callable[..., list[Launcher]]]:
    """Starts launchers; none is left behind."""
    started: list[Launcher] = []

    def launch(*arguments: object, **more: object) -> list[Launcher]:
        new = start(*arguments, **more)  # type: ignore[arg-type]
        started.extend(new)
        return new

    yield launch
    for launcher in started:
        for pid in [*workers(launcher), launcher.pid] if launcher.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        launcher.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_two_machines(
    kind: str,
    folders: Sequence[Path],
    launched: Callable[..., list[Launcher]],
    machines: Callable[..., Machines],
    shards: Path,
    transformer_only: Path,
) -> None:
    """Two processes on each, with a base for each machine; as one process with four times the
    accumulation."""
    argv = train_argv("shards", "model", "run", shard_base="node", max_train_steps=4)
    finish(launched(kind, folders, argv, per_node=2), folders)
    one = machines("one", 1)
    more = {"max_train_steps": 4, "gradient_accumulation_steps": 4}
    settled(one.run(train_argv(shards, transformer_only, one.folder / "run", **more)))
    lora = folders[0] / "run" / "lora.safetensors"
    assert distance(lora, one.folder / "run" / "lora.safetensors") < 1e-5
    assert not (folders[1] / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_precompute_on_two_machines(
    kind: str,
    folders: Sequence[Path],
    launched: Callable[..., list[Launcher]],
    tmp_path: Path,
    machines: Callable[..., Machines],
) -> None:
    finish(launched(kind, folders, precompute_argv("model", tmp_path / "set"), 2), folders)
    assert visible(tmp_path / "set") == alone(machines, folders)


def alone(machines: Callable[..., Machines], folders: Sequence[Path]) -> dict[str, bytes]:
    """The set that one process makes."""
    one = machines("one", 1)
    shutil.copytree(folders[0] / "images", one.of(0) / "images")
    shutil.copytree(folders[0] / "model", one.of(0) / "model")
    settled(one.run(precompute_argv("model", "set")))
    return visible(one.of(0) / "set")


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_stand_in() as server:
        yield server


def test_precompute_on_two_machines_into_a_bucket(
    s3: S3Server,
    folders: Sequence[Path],
    launched: Callable[..., list[Launcher]],
    machines: Callable[..., Machines],
) -> None:
    """Nothing on disk is shared."""
    argv = precompute_argv("model", f"s3://{BUCKET}/together")
    finish(launched("torchrun", folders, argv, 2), folders)
    expected = alone(machines, folders)
    assert s3.objects("together") == expected
    assert [(folder / "shards-together").exists() for folder in folders] == [False, False]


def wait_for_steps(started: Sequence[Launcher], folders: Sequence[Path], count: int) -> None:
    metrics = folders[0] / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert all(launcher.poll() is None for launcher in started), logs(folders)
        assert time.monotonic() < deadline, logs(folders)
        time.sleep(0.05)


@pytest.mark.parametrize("shard_base", ["none", "all"])
def test_a_killed_rank_ends_both_machines(
    shard_base: str, folders: Sequence[Path], launched: Callable[..., list[Launcher]]
) -> None:
    argv = train_argv("shards", "model", "run", max_train_steps=100_000, shard_base=shard_base)
    started = launched("torchrun", folders, argv)
    wait_for_steps(started, folders, 3)
    (victim,) = workers(started[1])
    os.kill(victim, signal.SIGKILL)
    struck = time.monotonic()
    codes = [launcher.wait(timeout=90) for launcher in started]
    print(f"both launchers have ended {time.monotonic() - struck:.1f} s after the kill")
    assert 0 not in codes
    said = logs(folders)[0]
    assert len(re.findall("^error: process 1 ended without a word", said, re.MULTILINE)) == 1, said


def test_a_stop_of_one_machine_saves_the_run(
    folders: Sequence[Path], launched: Callable[..., list[Launcher]]
) -> None:
    argv = train_argv("shards", "model", "run", max_train_steps=100_000, checkpointing_steps=99_999)
    started = launched("torchrun", folders, argv)
    wait_for_steps(started, folders, 3)
    started[1].send_signal(signal.SIGTERM)
    codes = [launcher.wait(timeout=90) for launcher in started]
    assert 0 not in codes
    (step,) = CheckpointStore(folders[0] / "run").steps()
    assert step >= 3 and f"stopped at step {step}, saved" in logs(folders)[0]
