"""What every benchmark shares: the machine's facts, repeats taken in turn, one aligned table."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "diffusers", "peft", "accelerate", "webdataset", "safetensors", "numpy")


def machine() -> str:
    """Processor, cores, versions and commit, as printed above each table."""
    name = platform.processor() or "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    return (
        f"machine: {name}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}\nversions: {versions}\ncommit: {commit or 'unknown'}"
    )


@dataclass(frozen=True)
class Taken:
    """Seconds that one repeat took: on the clock, on all cores together, and on a core by the
    thread that ran it."""

    wall: float
    cpu: float
    main: float


def take_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Taken]]:
    """Run each way once per repeat, one after the other, so that a busy machine hits all alike.
    The first round warms up and is not counted."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            gc.collect()
            begun = _now()
            way()
            if number:
                taken[name].append(Taken(*(b - a for a, b in zip(begun, _now(), strict=True))))
    return taken


def _now() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), time.thread_time()


def median_ms(values: Sequence[float], units: int) -> float:
    """Milliseconds a unit."""
    return 1000 * statistics.median(values) / units


def spread(values: Sequence[float], units: int) -> str:
    return f"{1000 * min(values) / units:.2f}-{1000 * max(values) / units:.2f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        first, *others = (cell for cell in row)
        line = first.ljust(widths[0]) + "".join(
            f"  {cell.rjust(width)}" for cell, width in zip(others, widths[1:], strict=True)
        )
        print(line)
        if number == 0:
            print("-" * len(line))
