"""One block's forward and backward pass, compiled, under several memory budgets.

python benchmarks/block.py [--px N] [--text N] [--blocks N] [--budgets X ...]
python benchmarks/block.py --blocks 2 --heads 2 --px 64 --budgets 0 1      a small one, on a CPU

Some blocks of the real width with random weights, one behind the other; a LoRA on attention. "run
again" is torch's checkpoint around the compiled block instead of a budget; "static" a graph made
for this size alone. Memory is the peak above weights, a block (on a GPU).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import machine, print_table
from random_model import HEAD, fill
from torch import _dynamo
from torch.utils.checkpoint import checkpoint

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.families.qwen_image.blocks import Rotations, run_block
from qwen_lora.families.qwen_image.compiled import CompiledBlock
from qwen_lora.train.attention import choose_attention, measure_on, use_attention
from qwen_lora.train.lora import LoraSpec, add_lora


def make_blocks(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=options.blocks, num_attention_heads=options.heads, attention_head_dim=HEAD
        )
    for block in model.transformer_blocks:
        block.img_mod = block.txt_mod = torch.nn.Identity()  # their outputs are inputs here
    fill(model, device, dtype)
    model.requires_grad_(False)
    add_lora(
        model, LoraSpec.from_settings(Settings(rank=options.rank)), family_by_name("qwen-image"), 0
    )
    return model.train().transformer_blocks


class Pass:
    """A forward and a backward pass through all blocks."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.blocks = make_blocks(options, device, dtype)
        width, tokens = options.heads * HEAD, (options.px // 16) ** 2
        new = partial(torch.randn, device=device, dtype=dtype)
        self.image, self.text = new(1, tokens, width), new(1, options.text, width)
        self.rows = new(1, 6 * width) * 0.1
        self.rotations = Rotations(self._turns(tokens), self._turns(options.text))

    def _turns(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.rand(count, 1, HEAD // 2, device=self.device) * 6
        return angles.cos(), angles.sin()

    def run(self, block_of: Callable[..., Any]) -> tuple[float, float]:
        """Seconds: the whole, and of that the forward pass."""
        image, text = (x.detach().requires_grad_() for x in (self.image, self.text))
        start = self._now()
        for block in self.blocks:
            image, text = block_of(
                block, image, text, self.rows, self.rows, self.rotations, None, None, False
            )
        middle = self._now()
        (image.float().mean() + text.float().mean()).backward()
        return self._now() - start, middle - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(options: argparse.Namespace, device: torch.device) -> None:
    passes = Pass(options, device)
    shape = (1, options.heads, passes.image.shape[1] + options.text, HEAD)
    use_attention(choose_attention("auto", device, measure_on(device, passes.image.dtype, shape)))
    ways: dict[str, Callable[..., Any]] = {"not compiled": run_block}
    again = partial(checkpoint, CompiledBlock(1.0), use_reentrant=False, preserve_rng_state=False)
    ways["compiled, run again"] = again
    for budget in options.budgets:
        ways[f"compiled, budget {budget:g}"] = CompiledBlock(budget)
    ways["compiled, static"] = torch.compile(run_block, dynamic=False)
    rows = []
    for name, way in ways.items():
        _dynamo.reset()
        started = time.perf_counter()
        passes.run(way)
        compiling = time.perf_counter() - started
        passes.run(way)
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if held:
            torch.cuda.reset_peak_memory_stats()
        taken = [passes.run(way) for _ in range(options.repeats)]
        peak = (torch.cuda.max_memory_allocated() - held) / options.blocks / 2**20 if held else None
        per_block = [
            1000 * statistics.median(one) / options.blocks for one in zip(*taken, strict=True)
        ]
        rows.append(
            [
                name,
                *(f"{one:.3f}" for one in per_block),
                "" if peak is None else f"{peak:.1f}",
                f"{compiling:.1f}",
            ]
        )
    print_table(
        f"this project, {options.blocks} blocks of {options.heads} heads, {options.px} px, "
        f"{options.text} text tokens, rank {options.rank}, a block",
        ["", "ms", "of that forward", "MiB", "first pass s"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--text", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 1])
    options = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        print(f"device: {torch.cuda.get_device_name()}")
    measure(options, torch.device("cuda" if on_gpu else "cpu"))


if __name__ == "__main__":
    main()
