"""The benchmark scripts run; what they measure is theirs to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
    "data_path.py": ["--samples", "4", "--repeats", "1"],
    "mixed_lengths.py": ["--px", "64", "--layers", "1", "--heads", "1", "--repeats", "1"],
    "precompute.py": [
        "--px",
        "32",
        "--targets",
        "32",
        "--images",
        "1",
        "--captions",
        "3",
        "--base-dim",
        "8",
        "--text-width",
        "64",
        "--repeats",
        "1",
    ],
    "memory.py": ["--width", "1", "--blocks", "2", "--px", "32", "--text", "4"],
    "remote.py": [
        "--samples",
        "4",
        "--per-shard",
        "2",
        "--px",
        "64",
        "--step-ms",
        "1",
        "--repeats",
        "1",
    ],
    "streaming.py": [
        *("--on-device", "all", "2", "0", "--blocks", "5", "--width", "1", "--px", "32"),
        *("--text", "4", "--rank", "2", "--steps", "1", "--offload"),
    ],
    "train_step.py": [
        *("--layers", "1", "--heads", "1", "--px", "64", "--tokens", "8", "--rank", "2"),
        *("--steps", "1", "--warm-up", "0", "--repeats", "1", "--ways", "example", "selective"),
    ],
    "trainer_overhead.py": ["--px", "128", "--steps", "4", "--repeats", "1"],
    "vae_encode.py": ["--px", "32", "--repeats", "1", "--base-dim", "16"],
}


def test_each_script_has_a_smallest_run() -> None:
    helpers = {"common.py", "example.py", "loops.py", "synthetic.py", "throttled.py"}
    assert {path.name for path in BENCHMARKS.glob("*.py")} - helpers == set(SMALLEST)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_it_prints_its_table(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *SMALLEST[name]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "machine:" in done.stdout and "-----" in done.stdout
    assert "this project" in done.stdout or "ShardSet.read" in done.stdout
