"""Emoji pictures as pixels for the VAE: read once, augmented afresh for every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from qwen_lora.errors import InputError

SUFFIXES = (".png", ".webp")


def read_images(folder: Path, side: int) -> torch.Tensor:
    """Every picture of a folder in name order. Returns [N, 4, side, side] uint8, RGB and alpha.

    Colours are resized multiplied by alpha, so that hidden colours do not bleed into edges.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder} holds no {' or '.join(SUFFIXES)} pictures")
    pixels = []
    for file in files:
        with Image.open(file) as image:
            rgba = image.convert("RGBA").convert("RGBa")
        if rgba.size != (side, side):
            rgba = rgba.resize((side, side), Image.Resampling.LANCZOS)
        pixels.append(np.asarray(rgba.convert("RGBA")))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """[B, 4, H, W] uint8 -> [B, 3, H, W] float32 in [-1, 1]."""
    return _compose(rgba, torch.ones(rgba.shape[0], 3, 1, 1))


def augmented(rgba: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flips, small shifts and zooms, other colours and other backgrounds, so that the VAE learns
    pictures and not 1,000 emoji by heart. [B, 4, H, W] uint8 -> [B, 3, H, W] float32 in [-1, 1].
    """
    batch = rgba.shape[0]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    colored = uniform(0, 1, batch, 1, 1, 1) < 0.3
    background = torch.where(colored, uniform(0, 1, batch, 3, 1, 1), torch.ones(1))
    pixels = _compose(rgba, background)

    zoom = uniform(0.85, 1.1, batch)  # below 1: enlarged
    mirror = torch.where(uniform(0, 1, batch) < 0.5, -1.0, 1.0)
    affine = torch.zeros(batch, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = zoom * mirror, zoom
    affine[:, :, 2] = uniform(-0.12, 0.12, batch, 2)
    moved = torch.rand(1, generator=generator) < 0.5  # half the batches keep their sharp pixels
    if not moved:
        affine[:, 1, 1], affine[:, 0, 0], affine[:, :, 2] = 1.0, mirror, 0.0
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    gain, offset = uniform(0.8, 1.1, batch, 3, 1, 1), uniform(-0.2, 0.2, batch, 3, 1, 1)
    tinted = uniform(0, 1, batch, 1, 1, 1) < 0.3
    pixels = torch.where(tinted, pixels * gain + offset, pixels)
    return pixels.clamp(-1, 1)


def _compose(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """background: [B, 3, 1, 1] in [0, 1]."""
    color, alpha = rgba[:, :3].float() / 255, rgba[:, 3:].float() / 255
    return (color * alpha + background * (1 - alpha)) * 2 - 1
