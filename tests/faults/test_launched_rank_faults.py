"""Faults of one rank under the project's own launcher, in fresh processes: the error is said once,
the exit code tells, nobody is left."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from rank_runs import HERE, ROOT, SETTINGS, train_command

from qwen_lora.launch import launch_processes

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="the launcher's promises are POSIX ones"),
]
KILLED = "process {rank} ended without a word"
BUG = "process {rank}: RuntimeError: CUDA error: an illegal memory access"
CASES = [  # fault, occasion, rank, the launcher's exit code, what is said once
    ("damaged record", 8, 1, 1, "sample [0-9a-f]{32}"),
    ("memory short in a reader", 8, 0, 1, "sample [0-9a-f]{32}: MemoryError"),
    ("no GPU memory, backward", -3, 1, 1, "step 3: the GPU's memory is too small"),
    ("bug in backward", -3, 1, 1, BUG),
    ("bug in forward", 3, 0, 1, BUG),
    ("loss not finite", 3, 1, 1, "step 3: the loss .nan. .*is not finite"),
    ("killed in forward", 3, 1, 137, KILLED),
    ("killed in backward", -3, 0, 137, KILLED),
    ("killed at a save", 2, 0, 137, KILLED),
    ("killed while loading", 1, 1, 137, KILLED),
    ("full disk at a save", 3, 0, 1, "cannot save the checkpoint of step 4"),
    ("full disk at the export", 1, 0, 1, "cannot write the results"),
    ("model does not load", 1, 1, 1, BUG),
    ("module missing", 1, 1, 1, "process 1: ImportError: libgone.so.1"),
    ("other package", 1, 1, 2, "the version of peft is"),
    ("SIGTERM", 3, 1, 143, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "number", "rank", "code", "said"), CASES)
def test_the_launcher_says_the_first_error_once(
    fault: str,
    number: int,
    rank: int,
    code: int,
    said: str,
    transformer_only: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from tests.train.random_sets import random_set

    shards, struck = random_set(tmp_path / "shards", 13, per_shard=2), tmp_path / "struck"
    order = {"rank": rank, "name": fault, "number": number}
    places = {"shards": str(shards), "struck": str(struck)}
    monkeypatch.setenv("RANK_FAULT", json.dumps(order | places))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))
    argv = train_command(shards, transformer_only, tmp_path / "run", SETTINGS)
    argv += ["--num-processes", "2"]
    ended = launch_processes(argv, 2, program=(sys.executable, str(HERE / "rank_alone.py")))
    seconds = time.monotonic() - float(struck.read_text())
    output = capfd.readouterr().err
    errors = re.findall("^error: .*$", output, re.MULTILINE)
    assert ended == code, output
    assert "Traceback" not in output, output
    if code == 143:
        assert not errors and output.count("stopped at step 3, saved") == 1, output
    else:
        assert len(errors) == 1 and re.search(said.replace("{rank}", str(rank)), errors[0]), output
    assert seconds < 60
    with capfd.disabled():
        print(f"\n{fault} in rank {rank} of 2, launched: over after {seconds:.1f} s", end=" ")
