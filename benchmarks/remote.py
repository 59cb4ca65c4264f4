"""What training from a URL costs beside a folder: the same batches, in steps of a given length.

python benchmarks/remote.py [--samples N] [--step-ms MS] [--mb-per-s N] [--delay-ms N]

A web server in a process of its own sends the shards, all connections together at the given rate
and each answer after the given delay. The consumer takes a micro-batch of one sample, waits as long
as a training step would take, and takes the next. The remote ways start with an empty cache each
time, and opening the set is part of the time. "no look-ahead" waits for each shard when it is
needed first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from common import machine, print_table
from synthetic import write_set

from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.plan import BatchRule, PlanTable
from qwen_lora.train.timesteps import TimestepSampling


@contextmanager
def served(folder: Path, mb_per_s: float, delay_ms: float) -> Iterator[str]:
    script = Path(__file__).with_name("throttled.py")
    command = [sys.executable, str(script), str(folder), str(mb_per_s), str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


def run(place: str, steps: int, step_s: float, shuffle: str, ahead: int) -> tuple[float, float]:
    """Seconds of all steps with the opening of the set, and until the first batch."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        with ShardSet.open(place, cache=ShardCache(Path(cache), 1 << 40)) as shards:
            rule = BatchRule(1, 1, seed=0, shuffle=shuffle)
            table = PlanTable.from_sets([shards])
            loader = BatchLoader(
                [shards], table, rule, TimestepSampling(), download_ahead_bytes=ahead
            )
            stream = loader.stream_epochs(0)
            first = 0.0
            for _ in islice(stream, steps):
                first = first or time.perf_counter() - start
                time.sleep(step_s)
            total = time.perf_counter() - start
            stream.close()
    return total, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--per-shard", type=int, default=32)
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=50)
    parser.add_argument("--mb-per-s", type=float, default=200)
    parser.add_argument("--delay-ms", type=float, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set"
        write_set(path, options.samples, options.px, options.tokens, options.per_shard)
        size = sum(each.stat().st_size for each in path.glob("*.tar"))
        with served(path, options.mb_per_s, options.delay_ms) as url:
            ways = {
                "folder": (str(path), "block", 0),
                "this project, shuffle: block": (url, "block", 1 << 40),
                "this project, shuffle: full": (url, "full", 1 << 40),
                "no look-ahead, shuffle: block": (url, "block", 0),
            }
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(options.repeats):
                for name, (place, shuffle, ahead) in ways.items():
                    step_s = options.step_ms / 1000
                    taken[name].append(run(place, options.samples, step_s, shuffle, ahead))
    local = statistics.median(total for total, _ in taken["folder"])
    rows = []
    for name, results in taken.items():
        total = statistics.median(total for total, _ in results)
        first = statistics.median(first for _, first in results)
        rows.append(
            (
                name,
                f"{options.samples / total:.2f}",
                f"{total:.2f}",
                f"{first:.2f}",
                f"{local / total:.3f}",
            )
        )
    print_table(
        f"one epoch of {options.samples} samples, {size / 1e6:.0f} MB in shards of "
        f"{options.per_shard}, steps of {options.step_ms:.0f} ms, source {options.mb_per_s:.0f} "
        f"MB/s with {options.delay_ms:.0f} ms, {options.repeats} repeats in turn",
        ("", "samples/s", "s", "first batch s", "of local"),
        rows,
    )


if __name__ == "__main__":
    main()
