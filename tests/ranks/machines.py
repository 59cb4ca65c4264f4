"""Machines that share no disk, as folders: each has its own caches, home and current folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qwen_lora.train.metrics import read_metrics
from tests.faults.rank_runs import DEADLINE_S, RankServer, Run, free_port

OF_MACHINE = {  # environment variable -> folder inside the machine's
    "QWEN_LORA_CACHE": "cache",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "xdg",
    "HOME": "home",
}


@dataclass(frozen=True)
class Machines:
    """`processes` of each machine, whose folders are `folder`/0, `folder`/1, ..."""

    server: RankServer
    folder: Path
    processes: tuple[int, ...]

    def __post_init__(self) -> None:
        for node in range(len(self.processes)):
            for name in OF_MACHINE.values():
                (self.of(node) / name).mkdir(parents=True, exist_ok=True)

    def of(self, node: int) -> Path:
        return self.folder / str(node)

    def environment(self, node: int) -> dict[str, str]:
        return {key: str(self.of(node) / name) for key, name in OF_MACHINE.items()}

    def run(
        self,
        argv: Sequence[str],
        *,
        of_node: dict[int, list[str]] | None = None,
        without: Sequence[str] = (),
        constants: dict[str, float] | None = None,
        **more: str,
    ) -> Run:
        """Run `argv` on all of them as torchrun would. of_node: a machine's own arguments on top;
        without: variables that are not set; constants: of modules; more: variables of all."""
        port, world, orders = free_port(), sum(self.processes), []
        for node, count in enumerate(self.processes):
            for local in range(count):
                rank = len(orders)
                place: dict[str, Any] = {
                    "RANK": rank,
                    "LOCAL_RANK": local,
                    "WORLD_SIZE": world,
                    "LOCAL_WORLD_SIZE": count,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                values = {key: str(place[key]) for key in place if key not in without}
                orders.append(
                    {
                        "argv": [*argv, *(of_node or {}).get(node, [])],
                        "environment": {**values, **self.environment(node), **more},
                        "folder": str(self.of(node)),
                        "log": str(self.folder / f"rank-{rank}.log"),
                        "constants": constants or {},
                        "fault": {"name": "none", "number": 1, "shards": "", "struck": ""},
                    }
                )
        ends = self.server.run(orders, DEADLINE_S)
        logs = [Path(order["log"]).read_text(errors="replace") for order in orders]
        return Run([code for code, _ in ends], 0.0, logs)


def settled(run: Run) -> Run:
    """All processes have ended well."""
    assert set(run.codes) == {0}, run
    return run


def train_argv(shards: Any, model: Any, output: Any, **changes: Any) -> list[str]:
    values = {
        "rank": 4,
        "max_train_steps": 6,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "checkpointing_steps": 3,
        "validation_steps": 0,
        "preview_steps": 0,
        "logging_steps": 1,
        **changes,
    }
    argv = ["train", str(shards), "--model", str(model), "--output", str(output)]
    return argv + [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm; what a stopped run had beyond its checkpoint is gone."""
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


def distance(one: Path, other: Path) -> float:
    """Relative L2 distance of two LoRA files as vectors."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    difference = sum(float((a[key] - b[key]).double().square().sum()) for key in a)
    return float((difference / sum(float(b[key].double().square().sum()) for key in b)) ** 0.5)
