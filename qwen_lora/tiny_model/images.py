# ruff: noqa: TID253
"""Seeded synthetic pictures: flat and shaded shapes on a gradient, drawn with numpy.

They stand in for real images where latent statistics are measured: natural images are smooth, and
white noise would give a random VAE quite another spread.
"""

from __future__ import annotations

import numpy as np
import torch


def synthetic_images(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """`count` pictures. Returns [count, 3, height, width] float32 in [-1, 1]."""
    rng = np.random.Generator(np.random.Philox(seed))
    pictures = np.stack([_picture(rng, height, width) for _ in range(count)])
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()).to(torch.float32)


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One picture, [height, width, 3] float64 in [-1, 1]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]  # each [height, width]
    from_color, to_color = rng.uniform(-1, 1, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)[..., None]
    picture = from_color * (1 - ramp) + to_color * ramp
    for _ in range(rng.integers(2, 7)):
        center_y, center_x = rng.uniform(0.1, 0.9, 2)
        radius_y, radius_x = rng.uniform(0.08, 0.4, 2)
        power = rng.choice([2.0, 8.0])  # an ellipse, or nearly a rectangle
        distance = np.abs((y - center_y) / radius_y) ** power
        distance += np.abs((x - center_x) / radius_x) ** power
        cover = np.clip((1 - distance) * rng.uniform(2, 20), 0, 1)[..., None]
        shade = rng.uniform(-1, 1, 3) + rng.uniform(-0.5, 0.5) * (y - center_y)[..., None]
        picture = picture * (1 - cover) + shade * cover
    return np.asarray(np.clip(picture, -1, 1))
