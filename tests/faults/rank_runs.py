"""Runs of `train` on several gloo ranks as processes, each with its own copy of the shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 90.0  # of a run; what is still there by then hangs
SETTINGS = {
    "rank": 4,
    "max_train_steps": 6,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 9,
    "validation_steps": 0,
    "gradient_checkpointing": "false",
    "logging_steps": 1,
    "read_ahead": 2,
}


@dataclass(frozen=True)
class Run:
    """How the ranks of one run ended."""

    codes: list[int | None]  # None: hung and had to be killed; -9: killed by the fault
    seconds: float  # from the fault to the end of the last rank; 0 without a fault
    logs: list[str]

    @property
    def errors(self) -> list[list[str]]:
        """What each rank said went wrong."""
        return [re.findall(r"^error: (.*)$", log, re.MULTILINE) for log in self.logs]

    def __str__(self) -> str:
        parts = [
            f"--- rank {rank}: {code}\n{log}"
            for rank, (code, log) in enumerate(zip(self.codes, self.logs, strict=True))
        ]
        return f"last exit after {self.seconds:.1f} s\n" + "\n".join(parts)


class RankServer:
    """Starts ranks by forking a process that has imported everything."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_server.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()

    def run(self, orders: list[dict[str, Any]], deadline: float) -> list[tuple[int | None, float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ranks": orders, "deadline": deadline}) + "\n")
        self._process.stdin.flush()
        return [tuple(end) for end in json.loads(self._read())]

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the rank server has ended; see its stderr"
        return line


@dataclass(frozen=True)
class Job:
    """What one rank does and what goes wrong in it."""

    argv: list[str]
    fault: str = "none"
    number: int = 1  # of the occasion at which the fault strikes
    shards: Path = Path()  # what it damages

    def order(self, folder: Path, constants: dict[str, float]) -> dict[str, Any]:
        return {
            "argv": self.argv,
            "fault": {
                "name": self.fault,
                "number": self.number,
                "shards": str(self.shards),
                "struck": str(folder / "struck"),
            },
            "constants": constants,
        }


def start(
    server: RankServer, folder: Path, jobs: list[Job], constants: dict[str, float] | None = None
) -> Run:
    """Run one rank for each job, started by hand: nobody ends the others but they themselves."""
    struck, port, orders = folder / "struck", free_port(), []
    struck.unlink(missing_ok=True)
    for rank, job in enumerate(jobs):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(jobs)),
            "LOCAL_WORLD_SIZE": str(len(jobs)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = str(folder / f"rank-{rank}.log")
        orders.append(
            {**job.order(folder, constants or {}), "environment": environment, "log": log}
        )
    ends = server.run(orders, DEADLINE_S)
    logs = [Path(order["log"]).read_text(errors="replace") for order in orders]
    began = float(struck.read_text()) if struck.exists() else None
    last = max(end for _, end in ends)
    return Run([code for code, _ in ends], last - began if began else 0.0, logs)


@dataclass(frozen=True)
class Ranks:
    """Where the ranks of a training run work: `shards` is copied for each of them."""

    server: RankServer
    folder: Path
    shards: Path
    model: Path
    world: int

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def train(
        self,
        fault: str = "none",
        rank: int = 0,
        number: int = 1,
        *,
        elsewhere: str = "none",
        of_rank: dict[str, Any] | None = None,
        shards_of_rank: Path | None = None,
        constants: dict[str, float] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Run:
        """Train with one fault: `fault` strikes rank `rank`, `elsewhere` is what all others have;
        `of_rank`, `shards_of_rank`: that rank's own settings and set; `settings`: all ranks'."""
        jobs = []
        for each in range(self.world):
            copy, failing = self.folder / f"shards-{each}", each == rank
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(shards_of_rank if shards_of_rank and failing else self.shards, copy)
            values = SETTINGS | (settings or {}) | ((of_rank or {}) if failing else {})
            argv = train_command(copy, self.model, self.output, values)
            jobs.append(Job(argv, *((fault, number) if failing else (elsewhere, 1)), shards=copy))
        return start(self.server, self.folder, jobs, constants)


def train_command(shards: Path, model: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    command = ["train", str(shards), "--model", str(model), "--output", str(output)]
    return command + [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
