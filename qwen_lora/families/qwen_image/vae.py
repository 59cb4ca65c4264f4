# ruff: noqa: TID253
"""Images to normalised latents: the encoder half of `AutoencoderKLQwenImage`, for one frame.

The VAE is a video model. For a single frame its causal 3D convolutions see two frames of zeros and
then the image, so only the last temporal slice of each kernel counts: a 2D convolution with that
slice is the same mathematics at about half the time, without conv3d's work space. The temporal
convolutions of the downsampling blocks do not run on a first frame at all.

Parameter names are those of the checkpoint. B samples, C channels, H x W pixels, h x w latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen_lora.families.base import EncodedLatents
from qwen_lora.families.qwen_image.loading import damage_explained, empty_module, load_weights
from qwen_lora.models import ModelFolder


class RMSNorm(nn.Module):
    """Unit root mean square over channels, times a learned gain; normalised in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit: torch.Tensor = F.normalize(x.float(), dim=1).to(x.dtype)
        return unit * math.sqrt(x.shape[1]) * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = RMSNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(channels_in, channels_out, 1)
            if channels_in != channels_out
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.conv_shortcut(x)  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, h*w, 3C]
        query, key, value = qkv.contiguous().unsqueeze(1).chunk(3, dim=-1)  # each [B, 1, h*w, C]
        y = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        y = y.transpose(1, 2).reshape(batch, channels, height, width)
        return self.proj(y) + x  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the height and width; the pad goes to the bottom and right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resample(x)  # type: ignore[no-any-return]


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [config["base_dim"] * factor for factor in (1, *config["dim_mult"])]
        self.conv_in = nn.Conv2d(config.get("input_channels", 3), widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        scale, last = 1.0, len(config["dim_mult"]) - 1
        for level, (channels, channels_out) in enumerate(zip(widths, widths[1:], strict=False)):
            for _ in range(config["num_res_blocks"]):
                blocks.append(ResidualBlock(channels, channels_out))
                if scale in config["attn_scales"]:
                    blocks.append(AttentionBlock(channels_out))
                channels = channels_out
            if level != last:
                blocks.append(Downsample(channels_out))
                scale /= 2
        self.down_blocks = nn.Sequential(*blocks)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["z_dim"], 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class SingleFrameEncoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] to the posterior's moments [B, 2C, h, w]: mean, then log variance."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config["z_dim"], 2 * config["z_dim"], 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(pixels))  # type: ignore[no-any-return]


def _needed(key: str) -> str | None:
    """The encoder half of the checkpoint, without temporal convolutions."""
    if ".time_conv." in key or not key.startswith(("encoder.", "quant_conv.")):
        return None
    return key


def _last_frame(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("gamma"):
        return tensor.reshape(-1, 1, 1)
    return tensor[:, :, -1] if tensor.ndim == 5 else tensor  # [O, I, t, 3, 3] -> [O, I, 3, 3]


class QwenLatentEncoder:
    """See `families.base.LatentEncoder`."""

    def __init__(self, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config("vae")
        with damage_explained(model.component("vae")):
            self._module = empty_module(lambda: SingleFrameEncoder(config))
        load_weights(
            self._module,
            model.component("vae"),
            device=device,
            dtype=dtype,
            rename=_needed,
            reshape=_last_frame,
        )
        if device.type == "cpu":  # 6 to 22 % less time there; not measured on cards
            self._module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device, self._dtype = device, dtype
        # [1, C, 1, 1] float32
        self._mean = torch.tensor(config["latents_mean"], device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(config["latents_std"], device=device).view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> EncodedLatents:
        """pixels: [B, 3, H, W] in [-1, 1] -> mean and std [B, C, h, w] float32 on the CPU.

        Normalised as `QwenImagePipeline` undoes it: (z - latents_mean) / latents_std. The log
        variance is clamped as in diffusers' `DiagonalGaussianDistribution`.
        """
        moments = self._module(pixels.to(self._device, self._dtype)).float()  # [B, 2C, h, w]
        mean, log_variance = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return EncodedLatents(
            mean=((mean - self._mean) / self._std).cpu(), std=(std / self._std).cpu()
        )
