# ruff: noqa: TID253
"""Drawing one picture's latents with the transformer in training: Euler steps from noise.

The same picture as diffusers' pipeline draws from the same embeddings, seed and steps. Nothing that
training depends on is touched: no global generator, no gradient, no dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qwen_lora.families.base import Family
from qwen_lora.families.modules import compute_dtype
from qwen_lora.train.timesteps import round_to

Condition = tuple[torch.Tensor, torch.Tensor]  # embeddings [T, D], mask [T] bool


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    latent_size: tuple[int, int]  # [h, w]
    steps: int
    guidance: float  # up to 1: none
    seed: int


@contextmanager
def drawing_mode(transformer: torch.nn.Module) -> Iterator[None]:
    """No gradients and no LoRA dropout inside; as before afterwards."""
    was_training = transformer.training
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train(was_training)


def draw_latents(
    transformer: torch.nn.Module,
    family: Family,
    scheduler_config: Mapping[str, Any],
    drawing: Drawing,
    prompt: Condition,
    unconditional: Condition,
    device: torch.device,
) -> torch.Tensor:
    """Normalised latents [C, h, w] float32 on the CPU. Call it in `drawing_mode`."""
    dtype = compute_dtype(transformer)
    sigmas = family.inference_sigmas(scheduler_config, drawing.latent_size, drawing.steps)
    # On the CPU and in the compute type, as the pipeline does: a seed means the same everywhere.
    generator = torch.Generator("cpu").manual_seed(drawing.seed)
    shape = (1, family.latent_channels, *drawing.latent_size)
    latents = torch.randn(shape, generator=generator, dtype=dtype).float().to(device)
    embeds, empty = prompt[0].to(device), unconditional[0].to(device)  # [T, D]

    def velocity(sigma: torch.Tensor, of: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return family.velocity(transformer, latents, sigma, [of], [mask])

    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        sigma = round_to(now[None], dtype).to(device)  # [1]
        direction = velocity(sigma, embeds, prompt[1])
        if drawing.guidance > 1:
            opposite = velocity(sigma, empty, unconditional[1])
            direction = family.guided_velocity(direction, opposite, drawing.guidance)
        latents = latents + float(then - now) * direction
    return latents[0].cpu()
