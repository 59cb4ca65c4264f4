"""What a pass waits for: how long kernels compute, how long none does, copies, and which kernels.

python benchmarks/waiting.py                                  the full-size architecture, on a GPU
python benchmarks/waiting.py --ways compiled+full compiled+offload+36+stay14 compiled+on40
python benchmarks/waiting.py --width 1 --blocks 3 --px 64 --text 4      a small one, on a CPU

Ways and bases are those of memory.py. "s" is a forward and backward pass as memory.py times it. The
rest is torch's profiler's of two passes, which slows the processor down: where no kernel runs in
many short gaps the processor launches them too slowly, and a few long gaps wait for copies. "host"
is what the processor took for both passes until the last kernel was launched. On a CPU operators
stand for kernels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from memory import Passes, Way, make_model, make_passes, model_folder, prepare
from random_model import BASES
from torch.profiler import ProfilerActivity, profile

from qwen_lora.train.cost.step import StepModel

PASSES = 2
GAPS = (5e3, 2e4, 1e5, 1e6)  # ns; the edges between kinds of gap


@dataclass(frozen=True)
class Event:
    name: str
    begin: int  # ns
    end: int


def record(passes: Passes, on_gpu: bool) -> tuple[list[Event], float]:
    """What ran in PASSES passes, in order, and how long the processor was busy with them."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(PASSES):
            passes.losses().sum().backward()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[bool, list[Event]] = {True: [], False: []}
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in results.events():
        there = str(event.device_type()) == "DeviceType.CUDA"
        begin = event.start_ns()
        if there or event.name().startswith("aten::") or "launch" in event.name().lower():
            found[there].append(Event(event.name(), begin, begin + event.duration_ns()))
    launches = [event for event in found[False] if not on_gpu or "launch" in event.name.lower()]
    host = max(e.end for e in launches) - min(e.begin for e in launches) if launches else 0
    return sorted(found[on_gpu], key=lambda event: event.begin), host / 1e9


def is_copy(event: Event) -> bool:
    return event.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))


def gaps_of(kernels: list[Event]) -> list[int]:
    """Nanoseconds between kernels in which none ran."""
    found, last = [], kernels[0].begin
    for kernel in kernels:
        if kernel.begin > last:
            found.append(kernel.begin - last)
        last = max(last, kernel.end)
    return found


def busy_seconds(events: list[Event]) -> float:
    """In which at least one of them ran."""
    if not events:
        return 0.0
    whole = max(event.end for event in events) - events[0].begin
    return (whole - sum(gaps_of(events))) / 1e9


def report(way: str, seconds: float, events: list[Event], host: float, rows: int) -> list[object]:
    """Prints what took how long; returns the way's row."""
    kernels = [event for event in events if not is_copy(event)]
    gaps = gaps_of(kernels)
    edges = (0.0, *GAPS, float("inf"))
    print(f"\n{way}: gaps a pass")
    for low, high in zip(edges, edges[1:], strict=False):
        some = [gap for gap in gaps if low <= gap < high]
        name = f"up to {high / 1e3:g} us" if high < float("inf") else "longer"
        print(
            f"  {name:>14}: {len(some) // PASSES:6} of together {sum(some) / PASSES / 1e6:.2f} ms"
        )
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        times[event.name] += event.end - event.begin
        counts[event.name] += 1
    print_table(
        f"{way}: what took the longest, a pass",
        ["", "ms", "times", "us each"],
        [
            [
                name[:90],
                f"{taken / PASSES / 1e6:.2f}",
                f"{counts[name] / PASSES:.0f}",
                f"{taken / counts[name] / 1e3:.1f}",
            ]
            for name, taken in times.most_common(rows)
        ],
    )
    copies = {kind: [e for e in events if f"Memcpy {kind}" in e.name] for kind in ("HtoD", "DtoH")}
    return [
        way,
        f"{seconds:.4f}",
        f"{busy_seconds(kernels) / PASSES:.4f}",
        f"{sum(gaps) / PASSES / 1e9:.4f}",
        f"{host / PASSES:.4f}",
        f"{len(kernels) / PASSES:.0f}",
        *(f"{busy_seconds(some) / PASSES:.4f}" for some in copies.values()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument(
        "--base", default="bf16", help=f"{', '.join(BASES)}, with :forward or :both"
    )
    parser.add_argument("--ways", nargs="+", default=["compiled+full", "compiled+45"])
    parser.add_argument("--text", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--width", type=int, default=24, help="heads of 128")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--rows", type=int, default=30, help="kernels that are named")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    print(machine())
    if on_gpu:
        print(f"GPU: {torch.cuda.get_device_name()}")
    transformer, table = None, []
    ways = sorted(map(Way.parse, options.ways), key=lambda w: -(w.on_device or options.blocks))
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name), options.width, options.blocks)
        for way in ways:
            model = StepModel(folder, way.settings(options, options.base), torch.bfloat16)
            transformer = transformer or make_model(model, device)
            prepare(model, transformer, way)
            passes = make_passes(model, transformer, options.px, options)
            _, seconds = passes.measure()
            table.append(report(way.name, seconds, *record(passes, on_gpu), options.rows))
    print_table(
        f"this project, {options.px} px, {options.base}, {options.blocks} blocks of "
        f"{options.width} heads, rank {options.rank}, a pass",
        ["", "s", "kernels s", "gaps s", "host s", "kernels", "to device s", "to host s"],
        table,
    )


if __name__ == "__main__":
    sys.exit(main())
