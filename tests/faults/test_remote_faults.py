"""`precompute` to an object store: killed at its requests, beside others, in two processes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_points import End, ForkServer, visible_files

from qwen_lora.shards.verify import verify
from tests.s3_server import BUCKET, Fault, S3Server, s3_stand_in

pytestmark = pytest.mark.multiprocess
JOB = "precompute_remote"
PARTS = {False: "whole", True: "in parts"}


class Far:
    """A bucket, a process to fork runs from, and what an unbroken run makes."""

    def __init__(self, s3: S3Server, server: ForkServer, images: dict[str, Path], local: Path):
        self.s3, self.server, self.images = s3, server, images
        server.run("precompute_set", local)
        self.unbroken = visible_files(local)
        assert len([name for name in self.unbroken if name.endswith(".tar")]) == 3

    def start(self, state: Path, prefix: str, images: str = "all", **arguments: Any) -> int:
        """A run that waits for SIGCONT."""
        url = f"s3://{BUCKET}/{prefix}"
        arguments |= {"url": url, "images": str(self.images[images])}
        return self.server.start(JOB, state, stopped=True, **arguments)

    def finish(self, pid: int) -> End:
        os.kill(pid, signal.SIGCONT)
        return self.server.wait(pid)

    def run(self, state: Path, prefix: str, **arguments: Any) -> list[str]:
        """A run that must succeed; its requests."""
        self.s3.requests.clear()
        end = self.finish(self.start(state, prefix, **arguments))
        assert end.code == 0, end.log
        self.said = end.log
        return list(self.s3.requests)

    def clear(self, prefix: str) -> None:
        self.s3.faults.clear()
        for key in self.s3.keys(f"{prefix}/"):
            self.s3.delete(key)


@pytest.fixture(scope="module")
def far(
    tiny_model: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:
    folders = {"all": range(6), "first": range(3), "last": range(3, 6), "middle": range(1, 5)}
    images = {}
    for name, numbers in folders.items():
        images[name] = tmp_path_factory.mktemp(name)
        for number in numbers:
            for suffix in ("png", "txt"):
                shutil.copy(image_folder / f"{number:02d}.{suffix}", images[name])
    with s3_stand_in() as s3:
        started = ForkServer(
            tmp_path_factory.mktemp("server"),
            ("warm_up_precompute",),
            FAULT_IMAGES=str(images["all"]),
            FAULT_MODEL=str(tiny_model),
        )
        yield Far(s3, started, images, tmp_path_factory.mktemp("local") / "unbroken")
        started.close()


@pytest.fixture
def prefix(far: Far, tmp_path: Path) -> Iterator[str]:
    yield tmp_path.name
    far.clear(tmp_path.name)


def kill_at_request(far: Far, number: int, state: Path, prefix: str, parts: bool) -> bool:
    """Kill a run at its `number`-th request, which reaches the store or not; then run it again.
    False when it made fewer: now and then one is repeated."""
    lost = number % 2 == 1
    what = f"killed at request {number}, {'lost' if lost else 'done'}, {PARTS[parts]}"
    pid = far.start(state, prefix, parts=parts)
    kill = Fault("reset" if lost else "call", act=lambda: os.kill(pid, signal.SIGKILL))
    far.s3.faults += [*[None] * (number - 1), kill]
    end = far.finish(pid)
    if far.s3.faults:
        assert end.code == 0, end.log
        return False
    assert end.code == -9, what
    far.s3.settle()
    left = far.s3.objects(prefix)
    assert left.items() <= far.unbroken.items(), f"{what}: an object is not whole"
    if "manifest.json" in left:
        assert left == far.unbroken, f"{what}: a manifest lists what is not there"
    finished = [n for n in left if n.endswith(".tar") and n.replace(".tar", ".json") in left]
    requests = far.run(state, prefix, parts=parts)
    assert far.s3.objects(prefix) == far.unbroken, f"{what}: the rerun ended with other bytes"
    again = [
        name for name in finished for each in requests if each.startswith("P") and name in each
    ]
    assert not again, f"{what}: finished shards went up again"
    encoded = re.findall(r"encoding: \d+/(\d+) samples", far.said)
    wanted = str(6 - 2 * len(finished))
    assert {*encoded} == {wanted} - {"0"}, f"{what}: {encoded} encoded, {wanted} were missing"
    assert not list(state.glob("*.tmp")), what
    return True


def test_kill_9_at_a_request(far: Far, tmp_path: Path, prefix: str, rng: random.Random) -> None:
    parts = rng.random() < 0.5
    assert kill_at_request(far, rng.randrange(5, 20), tmp_path / "state", prefix, parts)


@pytest.mark.slow
def test_kill_9_at_every_request(far: Far, tmp_path: Path, prefix: str) -> None:
    begun, kills, state = far.s3.uploads(), 0, tmp_path / "state"
    for parts in PARTS:
        requests = far.run(state, prefix, parts=parts)
        assert far.s3.objects(prefix) == far.unbroken
        for number in range(1, len(requests) + 1):
            far.clear(prefix)
            shutil.rmtree(state)
            kills += kill_at_request(far, number, state, prefix, parts)
        far.clear(prefix)
    print(f"{kills} kills at requests, {far.s3.uploads() - begun} uploads in parts left unfinished")
    assert kills > 40


def run_together(far: Far, tmp_path: Path, prefix: str, each: list[str]) -> None:
    """Runs that are started together, each as on a machine of its own."""
    pids = [
        far.start(tmp_path / f"state {number}", prefix, images=images)
        for number, images in enumerate(each)
    ]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for pid in pids:
        end = far.server.wait(pid)
        assert end.code == 0, end.log


def test_one_dataset_on_two_machines_at_once(far: Far, tmp_path: Path, prefix: str) -> None:
    run_together(far, tmp_path, prefix, ["all", "all"])
    files = far.s3.objects(prefix)
    # A machine that sees some of the other's shards adopts them and makes the same rest.
    assert files == far.unbroken


def check_union(far: Far, prefix: str, images: int) -> None:
    report = verify(f"s3://{BUCKET}/{prefix}", deep=True)
    assert (report.problems, report.samples) == ([], images)


@pytest.mark.slow
def test_three_datasets_at_once_lose_nothing(far: Far, tmp_path: Path, prefix: str) -> None:
    run_together(far, tmp_path, prefix, ["first", "last", "middle"])
    check_union(far, prefix, 6)


@pytest.mark.slow
def test_many_runs_at_once(far: Far, tmp_path: Path, prefix: str, rng: random.Random) -> None:
    names = list(far.images)
    for trial in range(20):
        chosen = rng.choices(names, k=rng.randrange(2, 5))
        run_together(far, tmp_path / str(trial), prefix, chosen)
        images = {path.name for name in chosen for path in far.images[name].glob("*.png")}
        check_union(far, prefix, len(images))
        if set(chosen) == {"all"}:
            assert far.s3.objects(prefix) == far.unbroken
        far.clear(prefix)
    print("20 times two to four runs at once, nothing lost")


def test_two_processes_write_what_one_does(far: Far, tmp_path: Path, prefix: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [far.start(tmp_path / "state", prefix, rank=rank, port=port) for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for pid in pids:
        end = far.server.wait(pid)
        assert end.code == 0, end.log
    assert far.s3.objects(prefix) == far.unbroken
