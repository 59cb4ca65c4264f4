"""The loop of diffusers' example, to be measured beside this project's.

Written here from what `train_dreambooth_lora_qwen_image.py` does per step with --cache_latents and
captions of its own, on one device. Its data loader also stacks the decoded images of the batch,
which it goes on doing with cached latents; `pixels=False` leaves that out.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from synthetic import CHANNELS, SCALE
from tqdm import tqdm

from qwen_lora.shards.reader import ShardSet


class Images(torch.utils.data.Dataset):
    """Prompts and, as the example keeps them, decoded images."""

    def __init__(self, count: int, px: int, with_pixels: bool) -> None:
        side = px if with_pixels else 1
        self.pixels = [torch.zeros(3, side, side) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": self.pixels[index], "prompt": f"caption {index}"}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = torch.stack([item["pixels"] for item in items])
    return {
        "pixel_values": pixels.unsqueeze(2).to(memory_format=torch.contiguous_format).float(),
        "prompts": [item["prompt"] for item in items],
    }


def cached_batches(
    shards: ShardSet, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Any], list[torch.Tensor]]:
    """The posteriors and prompt embeddings of each batch, held in memory as the example does."""
    records = [shards.read(row).tensors for row in range(len(shards))]
    latents, embeds = [], []
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        mean = torch.stack([one["latents"].float() for one in some]).unsqueeze(2)
        moments = torch.cat([mean, torch.full_like(mean, -20.0)], dim=1)  # [B, 2C, 1, h, w]
        latents.append(DiagonalGaussianDistribution(moments.to(device, dtype)))
        embeds.append(torch.stack([one["prompt_embeds.0"] for one in some]).to(device, dtype))
    return latents, embeds


def make_loss(
    model: torch.nn.Module,
    latents: list[Any],
    embeds: list[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[int], torch.Tensor]:
    """The loss of the batch of that number, computed as the example does."""
    noise_scheduler = copy.deepcopy(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    shape = (1, CHANNELS, 1, 1, 1)
    mean, inverse_std = (make(shape, device=device) for make in (torch.zeros, torch.ones))
    mean, inverse_std = mean.to(dtype), inverse_std.to(dtype)

    def sigmas_of(timesteps: torch.Tensor, dims: int) -> torch.Tensor:
        sigmas = noise_scheduler.sigmas.to(device, dtype)
        known = noise_scheduler.timesteps.to(device)
        where = [(known == timestep).nonzero().item() for timestep in timesteps]
        return sigmas[where].flatten().view(-1, *[1] * (dims - 1))

    def loss_of(step: int) -> torch.Tensor:
        clean = (latents[step].sample() - mean) * inverse_std
        noise = torch.randn_like(clean)
        u = compute_density_for_timestep_sampling(
            weighting_scheme="none", batch_size=len(clean), logit_mean=0.0, logit_std=1.0
        )
        chosen = (u * noise_scheduler.config.num_train_timesteps).long()
        timesteps = noise_scheduler.timesteps[chosen].to(device)
        sigmas = sigmas_of(timesteps, clean.ndim)
        noised = ((1.0 - sigmas) * clean + sigmas * noise).permute(0, 2, 1, 3, 4)
        height, width = clean.shape[-2:]
        predicted = model(
            hidden_states=QwenImagePipeline._pack_latents(
                noised, len(clean), CHANNELS, height, width
            ),
            encoder_hidden_states=embeds[step],
            encoder_hidden_states_mask=None,
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * len(clean),
            return_dict=False,
        )[0]
        predicted = QwenImagePipeline._unpack_latents(
            predicted, height * SCALE, width * SCALE, SCALE
        )
        weight = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
        error = weight.float() * (predicted.float() - (noise - clean).float()) ** 2
        return error.reshape(len(clean), -1).mean(1).mean()

    return loss_of


def example_loop(
    model: torch.nn.Module,
    shards: ShardSet,
    batch: int,
    px: int,
    accelerator: Accelerator,
    *,
    pixels: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Callable[[int], None]:
    """A function that trains the given number of steps the example's way."""
    device = accelerator.device
    latents, embeds = cached_batches(shards, batch, device, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    loader = torch.utils.data.DataLoader(
        Images(len(shards), px, pixels), batch_size=batch, shuffle=False, collate_fn=collate
    )
    schedule = get_scheduler("constant", optimizer=optimizer)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    loss_of = make_loss(model, latents, embeds, device, dtype)

    def run(steps: int) -> None:
        done = 0
        bar = tqdm(total=steps, file=io.StringIO())
        while done < steps:
            for step, _batch in enumerate(loader):
                with accelerator.accumulate([model]):
                    loss = loss_of(step)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                bar.update(1)
                done += 1
                logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0]}
                bar.set_postfix(**logs)
                accelerator.log(logs, step=done)
                if done == steps:
                    break

    return run
