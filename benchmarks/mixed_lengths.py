"""Captions of different lengths in one batch: what they cost beside equal ones of as many tokens.

python benchmarks/mixed_lengths.py [--px N] [--layers N] [--heads N] [--batch N] [--repeats N]
                                   [--compile] [--recompute WAY]

Forward and backward of a random transformer with a LoRA, on this machine's device. diffusers pads
the shorter prompts and masks attention; this project runs each sample's attention by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import machine, median_ms, print_table, spread, take_turns
from random_model import config_of, make_transformer
from synthetic import CHANNELS, SCALE, WIDTH

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss

FAMILY = family_by_name("qwen-image")


def make_pass(
    options: argparse.Namespace, transformer: Any, lengths: list[int], device: torch.device
) -> Callable[[], None]:
    random = torch.Generator().manual_seed(0)
    side, batch, dtype = options.px // SCALE, len(lengths), getattr(torch, options.dtype)
    shape = (batch, CHANNELS, side, side)
    latents, noise = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    prompts = [torch.randn(n, WIDTH, generator=random).to(device, dtype) for n in lengths]
    masks = [torch.ones(n, dtype=torch.bool) for n in lengths]
    sigmas = torch.linspace(0.1, 0.9, batch)

    def run() -> None:
        losses = flow_matching_loss(transformer, latents, prompts, masks, noise, sigmas)
        losses.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="mean length")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="this project's blocks")
    parser.add_argument("--recompute", default="none", help="none, full or a number of blocks")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    print(machine())
    mean, half = options.tokens, options.batch - 1
    equal = [mean] * options.batch
    mixed = [mean + (2 * i - half) * 16 for i in range(options.batch)]  # the same sum
    ways = {}
    for name, own in (("this project", True), ("diffusers", False)):
        config = config_of(options.heads, options.layers)
        dtype = getattr(torch, options.dtype)
        transformer = make_transformer(config, device, dtype, tabled=False)
        add_lora(transformer, LoraSpec.from_settings(Settings(rank=8)), FAMILY, seed=0)
        compiled = own and options.compile
        how = ForwardOptions(own, Recompute.parse(options.recompute), compiled)
        FAMILY.prepare_training(transformer, how)
        ways[f"{name}, equal"] = make_pass(options, transformer, equal, device)
        ways[f"{name}, mixed"] = make_pass(options, transformer, mixed, device)
    taken = take_turns(ways, options.repeats)
    rows = []
    for name, times in taken.items():
        base = [one.wall for one in taken[name.replace("mixed", "equal")]]
        wall = [one.wall for one in times]
        ratio = median_ms(wall, 1) / median_ms(base, 1)
        rows.append([name, f"{median_ms(wall, 1):.0f}", spread(wall, 1), f"{ratio:.3f}"])
    print_table(
        f"{options.px} px, batch {options.batch}, captions of {equal} and {mixed} tokens, ms a "
        "forward and backward",
        ["", "median", "min-max", "mixed / equal"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
