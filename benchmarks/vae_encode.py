"""Encoding one image to latents: diffusers' causal 3D convolutions and this project's 2D ones.

python benchmarks/vae_encode.py [--px N ...] [--repeats N]

The architecture of Qwen-Image's VAE with random weights, float32, batch 1. For one frame only the
last temporal slice of each kernel meets the image, so the mathematics is the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import machine, median_ms, print_table, spread, take_turns
from diffusers import AutoencoderKLQwenImage

from qwen_lora.families import family_by_name
from qwen_lora.models import ModelFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base-dim", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    family = family_by_name("qwen-image")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        theirs = AutoencoderKLQwenImage(base_dim=options.base_dim).eval()
        theirs.save_pretrained(Path(name) / "vae")
        model = ModelFolder(Path(name), "benchmark/none", None, family)
        ours = family.load_latent_encoder(model, device=torch.device("cpu"), dtype=torch.float32)
        shape = (1, -1, 1, 1)
        mean = torch.tensor(theirs.config.latents_mean).view(shape)
        std = torch.tensor(theirs.config.latents_std).view(shape)
        for px in options.px:
            pixels = torch.rand(1, 3, px, px) * 2 - 1
            with torch.no_grad():
                three = (theirs.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
                two = ours.encode(pixels).mean
                taken = take_turns(
                    {
                        "diffusers, 3D": lambda pixels=pixels: theirs.encode(pixels[:, :, None]),
                        "this project, 2D": lambda pixels=pixels: ours.encode(pixels),
                    },
                    options.repeats,
                )
            base = median_ms([one.wall for one in taken["diffusers, 3D"]], 1)
            for way, times in taken.items():
                wall = [one.wall for one in times]
                median = median_ms(wall, 1)
                difference = f"{(two - three).abs().max():.1e}" if "2D" in way else ""
                rows.append(
                    [
                        f"{px} px, {way}",
                        f"{median:.0f}",
                        spread(wall, 1),
                        f"{median / base:.2f}",
                        difference,
                    ]
                )
    print_table(
        f"one image, float32, one thread, {options.repeats} repeats in turn, ms",
        ["", "median", "min-max", "vs 3D", "largest difference"],
        rows,
    )


if __name__ == "__main__":
    main()
