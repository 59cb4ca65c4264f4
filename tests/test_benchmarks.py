"""The benchmark scripts run; what they measure is theirs to say."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
    "block.py": [
        *("--blocks", "1", "--heads", "1", "--px", "32", "--text", "4", "--repeats", "1"),
        *("--rank", "2", "--budgets", "0"),
    ],
    "data_path.py": ["--samples", "4", "--repeats", "1"],
    "loading.py": ["--mib", "2", "--heads", "1", "--ways", "int8"],
    "low_precision.py": ["--tokens", "32", "--width", "32", "--repeats", "1", "--no-compile"],
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
    "lora_parts.py": [
        *("--tokens", "16", "--width", "32", "--rank", "2", "--repeats", "1", "--millions", "0.2"),
        *("--tensors", "6"),
    ],
    "memory.py": [
        *("--width", "1", "--blocks", "3", "--px", "32", "--text", "4"),
        *("--bases", "bf16", "fp8:both", "--ways", "full", "offload+1", "on1"),
    ],
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
    "sharded_base.py": [
        *("--layers", "2", "--heads", "1", "--px", "64", "--tokens", "8", "--rank", "2"),
        *("--steps", "1", "--warm-up", "0"),
    ],
    "train_step.py": [
        *("--layers", "1", "--heads", "1", "--px", "64", "--tokens", "8", "--rank", "2"),
        *("--steps", "1", "--warm-up", "0", "--repeats", "1", "--ways", "selective"),
    ],
    "trainer_overhead.py": ["--px", "128", "--steps", "4", "--repeats", "1"],
    "waiting.py": [
        *("--width", "1", "--blocks", "3", "--px", "32", "--text", "4", "--rank", "2"),
        *("--ways", "full", "offload+on1"),
    ],
    "vae_encode.py": ["--px", "32", "--repeats", "1", "--base-dim", "16"],
}


def test_each_script_has_a_smallest_run() -> None:
    helpers = {"common.py", "example.py", "loops.py", "random_model.py", "synthetic.py"}
    helpers |= {"throttled.py", "cards.py"}  # the second: tests/train/test_cards.py
    assert {path.name for path in BENCHMARKS.glob("*.py")} - helpers == set(SMALLEST)


# They compile, copy, or resize.
SLOW = {"block.py", "loading.py", "precompute.py"}


Scripts = Callable[..., str]


@pytest.fixture(scope="module")
def run_script() -> Iterator[Scripts]:
    """Runs a script in a fork of a process that has imported what they all import."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "script_server.py")],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == "ready\n"

    def run(name: str, *arguments: str) -> str:
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps([str(BENCHMARKS / name), *arguments]), file=server.stdin, flush=True)
        code, out, err = json.loads(server.stdout.readline())
        assert code == 0, err
        return str(out)

    yield run
    server.stdin.close()
    server.wait(timeout=20)
    server.stdout.close()


forks = pytest.mark.skipif(
    sys.platform != "linux", reason="forks a process that has imported torch"
)


@forks
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in sorted(SMALLEST)],
)
def test_it_prints_its_table(name: str, run_script: Scripts) -> None:
    out = run_script(name, *SMALLEST[name])
    assert "machine:" in out and "-----" in out
    assert "this project" in out or "ShardSet.read" in out


@forks
@pytest.mark.multiprocess
def test_the_step_that_it_compares_with(run_script: Scripts) -> None:
    """What train_step.py otherwise starts a process of its own for."""
    example = ["--ways", "example", "--way", "example", "--one-px", "64"]
    found = json.loads(run_script("train_step.py", *SMALLEST["train_step.py"], *example))
    assert found["seconds"] > 0 and found["batch"] == 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_loading_holds_what_stays_and_less_than_a_block(tmp_path: Path) -> None:
    """Memory of the process's own, at real widths: what stays, and while loading a few copies of
    one weight on top. One block is 648 MiB."""
    environment = os.environ | {"PYTHONPATH": f"{BENCHMARKS.parent}:{BENCHMARKS}"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    make = "import sys; from loading import MIB, Path, make_checkpoint as make; "
    make += "print(make(Path(sys.argv[1]), 24, 1300 * MIB, 500 * MIB))"
    block = int(run("-c", make, str(tmp_path)))
    # On a CPU weights that keep their type may be copied out of the file, where it is not aligned.
    for way in ("bf16", "fp8", "int8"):
        script = str(BENCHMARKS / "loading.py")
        found = json.loads(run(script, "--one", way, "--folder", str(tmp_path)))
        print(way, found)
        assert found["stays"] < 1.05 * found["held"] + (50 << 20)
        assert found["above"] < block / 2
