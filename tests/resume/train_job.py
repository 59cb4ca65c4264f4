"""The whole command `qwen-lora train`, as a job of the fork server.

One child is one rank; with several, rank 0 forks the others. Settings come as a file of JSON, which
is YAML. A child that has stopped itself at a step, or is killed, leaves what a real one would.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qwen_lora.cli import main
from qwen_lora.shards.remote import retries
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.step import Stepper


def train_run(
    folder: Path,
    settings: dict[str, Any],
    stop: dict[str, Any] | None = None,
    threads: int = 2,
    world: int = 1,
) -> int:
    """Start or continue the run in `folder`; the command's exit code.

    stop: at the step number `step` (from 0) one `rank` gets the signal `signum`, before the step or
    `after` its update, which for kill -9 is before its checkpoint. threads: of the loader.

    A store that fails is asked again at once, so that tests need not wait.
    """
    # Torch makes its thread pool anew after a fork, in a way that is not safe in several threads.
    torch.set_num_threads(1)
    kwdefaults = BatchLoader.__init__.__kwdefaults__
    assert kwdefaults is not None and "threads" in kwdefaults
    kwdefaults["threads"] = threads
    retries.random = SimpleNamespace(uniform=lambda *_: 0.0)  # type: ignore[attr-defined]
    others = _fork_others(world) if world > 1 else []
    rank = int(os.environ.get("RANK", "0"))
    if stop is not None:
        _stop_at(own_rank=rank, **stop)
    file = folder.with_name(f"{folder.name}-{rank}.yaml")
    file.write_text(json.dumps({**settings, "output_dir": str(folder)}))
    folder.with_name(f"{folder.name}.started").touch()
    code = run_command(["train", "--config", str(file)])
    if rank:
        os._exit(code)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in others]
    assert all(end == code for end in ends), (code, ends)
    return code


def run_command(words: list[str]) -> int:
    """The exit code; Ctrl-C before the command is ready for it ends a process with 130."""
    sys.argv = ["qwen-lora", *words]
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def _stop_at(step: int, signum: int, own_rank: int = 0, rank: int = 0, after: bool = False) -> None:
    if own_rank != rank:
        return
    plain = Stepper.run

    def run(self: Stepper, number: int, *arguments: Any) -> Any:
        if number == step and not after:
            os.kill(os.getpid(), signum)
        result = plain(self, number, *arguments)
        if number == step and after:
            os.kill(os.getpid(), signum)
        return result

    Stepper.run = run  # type: ignore[method-assign, assignment]


def _fork_others(world: int) -> list[int]:
    """The other ranks, and this one's place among them. In each the call returns once."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the warm-up was one rank
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    pids = []
    for rank in range(1, world):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return []
        pids.append(pid)
    return pids


def warm_up() -> None:
    """One short run with everything that a run may import."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = json.loads(os.environ["RESUME_SETTINGS"])
        code = train_run(Path(folder) / "run", {**settings, "max_train_steps": 1})
    assert code == 0
