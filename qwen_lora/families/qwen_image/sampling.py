# ruff: noqa: TID253
"""What drawing a picture needs besides the velocity, as diffusers' `QwenImagePipeline` does it.

B samples, C channels, h x w latents, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from qwen_lora.families.qwen_image.loading import damage_explained, empty_module, load_weights
from qwen_lora.families.qwen_image.tokens import pack, unpack
from qwen_lora.families.qwen_image.transformer import shift_mu
from qwen_lora.models import ModelFolder


def inference_sigmas(config: Mapping[str, Any], image_tokens: int, steps: int) -> torch.Tensor:
    """[steps + 1] float32, from the scheduler itself, set as the pipeline sets it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=shift_mu(config, image_tokens))
    return cast(torch.Tensor, scheduler.sigmas).float()


def guided_velocity(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: float
) -> torch.Tensor:
    """unconditional + scale (conditional - unconditional), each token of it brought back to the
    length that the conditional velocity has. All [B, C, h, w] float32."""
    height, width = conditional.shape[-2:]
    given, empty = pack(conditional), pack(unconditional)  # [B, tokens, C * 4]
    combined = empty + scale * (given - empty)
    given_length = torch.linalg.vector_norm(given, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(combined, dim=-1, keepdim=True)
    return unpack(combined * (given_length / length), height, width)


class QwenLatentDecoder:
    """See `families.base.LatentDecoder`. diffusers' own VAE without the weights of its encoder."""

    def __init__(self, model: ModelFolder, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKLQwenImage

        config = {k: v for k, v in model.config("vae").items() if not k.startswith("_")}
        with damage_explained(model.component("vae")):
            vae = empty_module(lambda: AutoencoderKLQwenImage(**config))
        vae.encoder = torch.nn.Identity()  # diffusers counts the layers of both halves
        vae.quant_conv = torch.nn.Identity()
        load_weights(
            vae,
            model.component("vae"),
            device=torch.device("cpu"),
            dtype=dtype,
            rename=lambda key: None if key.startswith(("encoder.", "quant_conv.")) else key,
        )
        self._vae: Any = vae
        self._dtype = dtype
        # [1, C, 1, 1]
        self._mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1)
        self._std = torch.tensor(config["latents_std"]).view(1, -1, 1, 1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, device: torch.device) -> torch.Tensor:
        raw = latents.float().cpu() * self._std + self._mean  # [1, C, h, w]
        try:
            self._vae.to(device)
            frames = self._vae.decode(raw[:, :, None].to(device, self._dtype)).sample
            return cast(torch.Tensor, frames[:, :, 0].float().cpu())  # [1, 3, H, W]
        finally:
            self._vae.to("cpu")
