"""Stage 1 on two and three ranks: one that fails or is killed stops all, and the same command then
makes the set of an undisturbed run."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from fault_points import visible_files
from rank_runs import Job, RankServer, Run, start

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch"),
]
KILLED = "process {rank} ended without a word"
BUG = "process {rank}: RuntimeError: CUDA error: an illegal memory access was encountered"
CASES = [  # fault, what all say, exit code, on rank 0 only
    ("bug in the encoders", BUG, 1, False),
    ("no model", BUG, 1, False),
    ("full disk at a shard", "cannot write to .*: No space left", 1, False),
    ("killed while encoding", KILLED, 1, False),
    ("killed while planning", KILLED, 1, True),
    ("killed at the manifest", KILLED, 1, True),
    ("SIGTERM while encoding", "stopped; finished shards are kept", 143, False),
]


class Stage1:
    """`precompute` of 12 images in 6 shards on several ranks, into one folder."""

    def __init__(self, server: RankServer, folder: Path, images: Path, model: Path) -> None:
        self._server, self.folder = server, folder
        self.shards = folder / "shards"
        changes = {"shard_max_samples": 2, "vae_batch_size": 2, "encode_threads": 1}
        self._argv = ["precompute", str(images), "--output", str(self.shards)]
        self._argv += ["--model", str(model), "--resolution", "96"]
        self._argv += [word for k, v in changes.items() for word in ("--set", f"{k}={v}")]

    def run(self, world: int, fault: str = "none", rank: int = 0) -> Run:
        jobs = [Job(self._argv, fault if each == rank else "none") for each in range(world)]
        return start(self._server, self.folder, jobs)

    def check(self, world: int, rank: int, fault: str, said: str, code: int) -> float:
        """All end with the same first error; seconds from the fault to the last exit."""
        run = self.run(world, fault, rank)
        where = f"{fault}, rank {rank} of {world}: {run}"
        assert None not in run.codes, f"hung: {where}"
        dead = rank if fault.startswith("killed") else None
        assert run.codes == [-9 if each == dead else code for each in range(world)], where
        assert not any("Traceback" in log for log in run.logs), where
        pattern = said.replace("{rank}", str(rank))
        lines = [
            re.findall(rf"^(?:error: )?.*{pattern}.*$", log, re.MULTILINE)
            for each, log in enumerate(run.logs)
            if each != dead and not (code == 143 and each)  # of a stop, rank 0 tells
        ]
        assert all(len(each) == 1 for each in lines), where
        assert len({each[0] for each in lines}) == 1, where
        assert run.seconds < 60, where
        return run.seconds

    def check_rerun(self, world: int, expected: dict[str, bytes]) -> None:
        run = self.run(world)
        assert run.codes == [0] * world, run
        assert visible_files(self.shards) == expected
        shutil.rmtree(self.shards)


@pytest.fixture
def stage1(rank_server: RankServer, tmp_path: Path, image_folder: Path, tiny_model: Path) -> Stage1:
    return Stage1(rank_server, tmp_path, image_folder, tiny_model)


@pytest.mark.parametrize(("fault", "rank"), [("killed while encoding", 1), ("no model", 0)])
def test_a_fault_of_one_rank_ends_all(stage1: Stage1, fault: str, rank: int) -> None:
    (case,) = [case for case in CASES if case[0] == fault]
    seconds = stage1.check(2, rank, *case[:3])
    print(f"{fault}: last of 2 ranks ended {seconds:.1f} s after the fault")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_fault_of_every_rank_ends_all(stage1: Stage1, world: int) -> None:
    """Every kind on each rank in turn, with a rerun after each."""
    run = stage1.run(world)
    assert run.codes == [0] * world, run
    expected = visible_files(stage1.shards)
    shutil.rmtree(stage1.shards)
    print(f"\n{'kind':<28} ranks  seconds from the fault to the last exit (worst of all ranks)")
    for fault, said, code, first_only in CASES:
        worst = 0.0
        for rank in range(1 if first_only else world):
            worst = max(worst, stage1.check(world, rank, fault, said, code))
            stage1.check_rerun(world, expected)
        print(f"{fault:<28} {world:>5} {worst:>8.1f}", flush=True)
