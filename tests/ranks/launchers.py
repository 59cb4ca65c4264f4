"""torchrun and accelerate launch, one launcher for each of several machines, all on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.rank_runs import ROOT, free_port
from tests.ranks.machines import OF_MACHINE

Launcher = subprocess.Popen[str]


def torchrun(node: int, nodes: int, per_node: int, port: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)]
    command += ["--nproc-per-node", str(per_node), "--node-rank", str(node)]
    return [*command, "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "qwen_lora"]


def accelerate_launch(node: int, nodes: int, per_node: int, port: int) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_machines", str(nodes), "--machine_rank", str(node)]
    command += ["--num_processes", str(nodes * per_node), "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1"]
    return [*command, "--main_process_port", str(port), "-m", "qwen_lora"]


LAUNCHERS = {"torchrun": torchrun, "accelerate launch": accelerate_launch}


def start(
    launcher: str, folders: Sequence[Path], argv: Sequence[str], per_node: int = 1
) -> list[Launcher]:
    """`argv` on one machine for each of `folders`, which is its current folder and holds its
    caches. A launcher's output goes to launcher.log there."""
    port, started = free_port(), []
    for node, folder in enumerate(folders):
        own = {key: folder / name for key, name in OF_MACHINE.items()}
        for path in own.values():
            path.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with (folder / "launcher.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    LAUNCHERS[launcher](node, len(folders), per_node, port) + list(argv),
                    cwd=folder,
                    env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return started


def logs(folders: Sequence[Path]) -> list[str]:
    return [(folder / "launcher.log").read_text(errors="replace") for folder in folders]


def finish(started: Sequence[Launcher], folders: Sequence[Path], seconds: float = 240) -> None:
    """All launchers end well."""
    codes = [launcher.wait(timeout=seconds) for launcher in started]
    assert set(codes) == {0}, "\n".join(logs(folders))


def workers(launcher: Launcher) -> list[int]:
    """The process ids of a launcher's ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            words = (path.parent / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent == launcher.pid and b"qwen_lora" in words:
            found.append(int(path.parent.name))
    return found
