"""The 2D encoder equals diffusers' 3D one."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image.vae import QwenLatentEncoder
from qwen_lora.models import ModelFolder
from qwen_lora.tiny_model.images import synthetic_images

CPU = torch.device("cpu")


def reference(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' own mode and spread, normalised as its pipeline undoes it. Each [B, C, h, w]."""
    with torch.no_grad():
        if vae.config.attn_scales:  # `encode` hands these blocks a cache that they do not take
            moments = vae.quant_conv(vae.encoder(pixels[:, :, None]))
            posterior = DiagonalGaussianDistribution(moments)
        else:
            posterior = vae.encode(pixels[:, :, None]).latent_dist
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    return (posterior.mode()[:, :, 0] - mean) / std, posterior.std[:, :, 0] / std


def test_equals_diffusers(model: ModelFolder, pipeline: Any) -> None:
    encoder = model.family.load_latent_encoder(model, device=CPU, dtype=torch.float32)
    pixels = synthetic_images(3, 80, 112, seed=7)
    encoded = encoder.encode(pixels)
    mean, std = reference(pipeline.vae, pixels)
    assert encoded.mean.shape == encoded.std.shape == (3, 16, 10, 14)
    assert encoded.mean.dtype == encoded.std.dtype == torch.float32
    torch.testing.assert_close(encoded.mean, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.std, std, atol=1e-4, rtol=0)
    assert not encoded.mean.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"attn_scales": [1.0, 0.25], "num_res_blocks": 2, "dim_mult": [1, 1, 3, 2], "z_dim": 4},
        {"temperal_downsample": [True, True], "dim_mult": [2, 1, 2], "z_dim": 8},
    ],
)
def test_equals_diffusers_for_other_configs(
    options: dict[str, Any], model: ModelFolder, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    channels = options["z_dim"]
    config = {"base_dim": 8, "num_res_blocks": 1, "attn_scales": [], **options}
    config.setdefault("temperal_downsample", [False, True, True])
    config["latents_mean"] = [0.1 * index for index in range(channels)]
    config["latents_std"] = [0.5 + 0.1 * index for index in range(channels)]
    vae = AutoencoderKLQwenImage(**config).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):  # ones would hide a wrong shape
                parameter.uniform_(0.5, 1.5)
    vae.save_pretrained(str(tmp_path / "vae"))
    encoder = QwenLatentEncoder(dataclasses.replace(model, path=tmp_path), CPU, torch.float32)
    pixels = synthetic_images(2, 48, 64, seed=8)
    mean, std = reference(vae, pixels)
    encoded = encoder.encode(pixels)
    torch.testing.assert_close(encoded.mean, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.std, std, atol=1e-4, rtol=0)


def test_bfloat16_is_close(model: ModelFolder, pipeline: Any) -> None:
    encoder = model.family.load_latent_encoder(model, device=CPU, dtype=torch.bfloat16)
    pixels = synthetic_images(2, 64, 64, seed=9)
    encoded = encoder.encode(pixels)
    mean, _ = reference(pipeline.vae, pixels)
    assert encoded.mean.dtype == torch.float32
    error = (encoded.mean - mean).norm() / mean.norm()
    assert 1e-4 < error < 0.05


def test_only_the_encoder_is_loaded(model: ModelFolder) -> None:
    encoder = QwenLatentEncoder(model, CPU, torch.float32)
    names = [name for name, _ in encoder._module.named_parameters()]
    assert not [name for name in names if "decoder" in name or "time_conv" in name]
    assert not [p for p in encoder._module.parameters() if p.ndim == 5 or p.requires_grad]


def test_a_vae_of_another_shape_is_refused(model: ModelFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(model.component("vae"), tmp_path / "vae")
    other = dataclasses.replace(model, path=tmp_path)
    config = json.loads((folder / "config.json").read_text())

    def load(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        model.family.load_latent_encoder(other, device=CPU, dtype=torch.float32)

    with pytest.raises(InputError, match="makes 48 channels at 1/8 size"):
        load(z_dim=48)
    with pytest.raises(InputError, match="its config asks for"):
        load(base_dim=16)
    with pytest.raises(InputError, match="lacks|no place for"):
        load(attn_scales=[1.0])
