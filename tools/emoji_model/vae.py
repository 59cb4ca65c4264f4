"""Trains `AutoencoderKLQwenImage` on single pictures, as 2D convolutions.

For one frame the causal 3D convolutions see zeros and then the picture, so only the last temporal
slice of a kernel counts: that slice is trained as a 2D convolution, and written back into kernels
whose other slices are zero. `time_conv` layers never run on a first frame and become zero too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageRMS_norm,
)
from torch import nn

from tools.emoji_model.images import augmented, on_white
from tools.emoji_model.state import Log, load_state, save_state

CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


@dataclass(frozen=True)
class VaeRecipe:
    steps: int = 9000
    batch: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4  # times the mean over latent values, in nats
    edge_weight: float = 0.5  # times the L1 distance of neighbouring pixels' differences
    seed: int = 0
    save_every: int = 500
    compiled: bool = True


class FrameConv(nn.Module):
    """A causal 3D convolution as it acts on a single frame. [B, C, 1, H, W] in and out."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        kernel = conv.weight.detach()[:, :, -1]  # [O, I, k, k]
        self.weight = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        assert conv.bias is not None
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
        padding = self.weight.shape[-1] // 2
        return F.conv2d(x.squeeze(2), self.weight, self.bias, padding=padding).unsqueeze(2)


class FrameNorm(nn.Module):
    """The VAE's root-mean-square norm over channels, in a form that compiles into one kernel."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-12)
        return x * scale.to(x.dtype) * self.gamma


def single_frame(module: nn.Module) -> None:
    """Replace, in place, what a single frame needs in 2D only."""
    for name, child in module.named_children():
        if name == "time_conv":
            setattr(module, name, None)
        elif isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv(child))
        elif isinstance(child, QwenImageRMS_norm):
            setattr(module, name, FrameNorm(child))
        else:
            single_frame(child)


def whole_vae(trained: nn.Module) -> Any:
    """The trained 2D weights in an `AutoencoderKLQwenImage` of diffusers."""
    vae = AutoencoderKLQwenImage(**CONFIG).eval()
    weights = trained.state_dict()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".time_conv." in name:
                parameter.zero_()
            elif parameter.shape != weights[name].shape:
                parameter.zero_()[:, :, -1] = weights[name]
            else:
                parameter.copy_(weights[name])
    return vae


def loss_parts(
    vae: Any, pixels: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L1, L1 of the differences between neighbours, KL to the standard normal, each a mean.

    pixels: [B, 3, 1, H, W] in [-1, 1]; noise: [B, C, 1, h, w].
    """
    moments = vae.quant_conv(vae.encoder(pixels)).float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    latents = mean + noise * torch.exp(0.5 * log_variance)
    error = vae.decoder(vae.post_quant_conv(latents)).float() - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return error.abs().mean(), edges, kl


def train_vae(folder: Path, images: torch.Tensor, recipe: VaeRecipe) -> Any:
    """images: [N, 4, S, S] uint8. Keeps its state under `folder`; returns the finished VAE."""
    torch.manual_seed(recipe.seed)
    module: Any = AutoencoderKLQwenImage(**CONFIG)
    single_frame(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, fused=True)
    schedule = one_cycle(recipe.steps, warmup=recipe.steps // 10)
    state = folder / "vae-state.safetensors"
    first = load_state(state, module, optimizer)
    log = Log(folder / "vae.jsonl", first)

    def compute(pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return loss_parts(module, pixels, noise)

    if recipe.compiled:
        compute = torch.compile(compute)
    began = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        pixels = augmented(images[rows], generator)[:, :, None]
        side = pixels.shape[-1] // 8
        noise = torch.randn(recipe.batch, CONFIG["z_dim"], 1, side, side, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            l1, edges, kl = compute(pixels, noise)
        loss = l1 + recipe.edge_weight * edges + recipe.kl_weight * kl
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            line = {"step": step + 1, "l1": l1.item(), "edges": edges.item(), "kl": kl.item()}
            log.write({**line, "seconds_per_step": seconds})
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save_state(state, step + 1, module, optimizer)
    return whole_vae(module)


def one_cycle(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear up over `warmup` steps, then a straight line down to zero."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (steps - step) / max(1, steps - warmup)

    return factor


@torch.no_grad()
def reconstruct(vae: Any, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """[N, 4, S, S] uint8 -> [N, 3, S, S] float32 in [-1, 1], through the posterior's mean."""
    parts = []
    for chunk in torch.split(images, batch):
        latents = vae.encode(on_white(chunk)[:, :, None]).latent_dist.mode()
        parts.append(vae.decode(latents).sample[:, :, 0].clamp(-1, 1))
    return torch.cat(parts)


@torch.no_grad()
def measure_latents(vae: Any, images: torch.Tensor, batch: int = 64) -> None:
    """Set `latents_mean` and `latents_std` to what the pictures' latents have, per channel."""
    parts = []
    for chunk in torch.split(images, batch):
        parts.append(vae.encode(on_white(chunk)[:, :, None]).latent_dist.mode())
    latents = torch.cat(parts)  # [N, C, 1, h, w]
    mean = [round(value, 5) for value in latents.mean(dim=(0, 2, 3, 4)).tolist()]
    std = [round(value, 5) for value in latents.std(dim=(0, 2, 3, 4)).tolist()]
    vae.register_to_config(latents_mean=mean, latents_std=std)
