"""What the trainer costs besides the model: this project's loop and the diffusers example's.

python benchmarks/trainer_overhead.py [--px N ...] [--batch N] [--model-ms MS]

Both drive a null transformer, which returns its input times one trainable number, over the same
latents and prompt embeddings. Ours reads, verifies and decodes its shards in every step, as it does
in training, and once keeps them in memory for comparison, as the example (benchmarks/example.py)
does, which stands here with and without the images that its data loader goes on stacking. With
--model-ms the null transformer waits that long, as a trainer waits for a GPU: what other threads do
meanwhile is free.

"main" is what the thread takes that feeds a GPU: time on a core, without waiting for the readers
beside it. At 64 px next to nothing is left but what a step costs whatever its size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import Taken, machine, median_ms, print_table, spread, take_turns
from example import example_loop
from loops import our_loop
from synthetic import write_set
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.timesteps import TimestepSampling

SAMPLES, TOKENS = 32, 128


class NullTransformer(torch.nn.Module):
    """Costs one multiplication, and the time that it is told to wait."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.wait_s = wait_s

    def forward(self, hidden_states: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
        if self.wait_s:
            time.sleep(self.wait_s)
        return (hidden_states * self.scale,)


# ---- measuring -----------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts dispatched operators, and reads of one value by Python. Ours reads a mask on the host;
    a list of values is not counted, and ours reads its results so, on a GPU once an interval."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def counts(run: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Operators and value reads a step in the main thread, which is the one that feeds a GPU."""
    with Counter() as counter:
        run(steps)
    return counter.operators / steps, counter.reads / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model-ms", type=float, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        for px in options.px:
            measure(Path(name) / str(px), px, options)


def measure(folder: Path, px: int, options: argparse.Namespace) -> None:
    write_set(folder / "set", SAMPLES, px, TOKENS)
    accelerator = Accelerator(cpu=True)
    with ShardSet.open(folder / "set") as shards:
        batch, wait_s = options.batch, options.model_ms / 1000

        def ours(ahead: int, in_memory: bool = False) -> Callable[[int], None]:
            model, sampling = NullTransformer(wait_s), TimestepSampling()
            rest = (model, shards, batch, folder, accelerator, sampling)
            return our_loop(*rest, read_ahead=ahead, in_memory=in_memory)

        def example(pixels: bool) -> Callable[[int], None]:
            model = NullTransformer(wait_s)
            return example_loop(model, shards, batch, px, accelerator, pixels=pixels)

        runs = {
            "this project": ours(4),
            "this project, no read-ahead": ours(0),
            "this project, batches in memory": ours(0, in_memory=True),
            "example": example(pixels=True),
            "example without its images": example(pixels=False),
        }
        with contextlib.redirect_stderr(io.StringIO()):
            ways = {name: (lambda run=run: run(options.steps)) for name, run in runs.items()}
            taken = take_turns(ways, options.repeats)
            counted = {name: counts(run, options.steps) for name, run in runs.items()}
    print_table(
        f"null transformer, {px} px, batch {batch}, {options.steps} steps, {options.repeats} "
        f"repeats in turn, ms a step besides the {options.model_ms:g} ms of the model",
        ["", "median", "min-max", "ratio", "cpu", "main", "ratio", "operators", "value reads"],
        table(taken, counted, options),
    )


def table(
    taken: dict[str, list[Taken]],
    counted: dict[str, tuple[float, float]],
    options: argparse.Namespace,
) -> list[list[str]]:
    """Ratios are those to the example."""
    waited = options.model_ms / 1000 * options.steps

    def wall_ms(name: str) -> float:
        return median_ms([one.wall - waited for one in taken[name]], options.steps)

    def main_ms(name: str) -> float:
        return median_ms([one.main for one in taken[name]], options.steps)

    rows = []
    for name, times in taken.items():
        operators, reads = counted[name]
        rows.append(
            [
                name,
                f"{wall_ms(name):.2f}",
                spread([one.wall - waited for one in times], options.steps),
                f"{wall_ms(name) / wall_ms('example'):.2f}",
                f"{median_ms([one.cpu for one in times], options.steps):.2f}",
                f"{main_ms(name):.2f}",
                f"{main_ms(name) / main_ms('example'):.2f}",
                f"{operators:.0f}",
                f"{reads:.1f}",
            ]
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
