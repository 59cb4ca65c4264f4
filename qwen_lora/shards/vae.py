"""A model's VAE as what draws latents. Torch is imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qwen_lora.errors import InputError
from qwen_lora.models import resolve_model
from qwen_lora.shards.format import Manifest
from qwen_lora.weight_hashes import weight_hashes


def vae_painter(
    manifest: Manifest, model_name: str
) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]]:
    """Latents [C, h, w] of the set to RGB [H, W, 3], on the GPU if there is one.

    Says so when the VAE's weight files are not those that the set was made with. Raises InputError
    for a model of another family.
    """
    import torch

    model = resolve_model(model_name, ["vae"])
    family = model.family
    if family.name != manifest.fingerprint.family:
        raise InputError(
            f"--vae {model_name} is of the family {family.name}, the set was made with "
            f"{manifest.fingerprint.family}"
        )
    made_with = manifest.fingerprint.vae.get("weights")
    if made_with != sorted(weight_hashes(model.component("vae")).values()):
        print(
            f"note: the VAE of {model_name} is in other files than the one that made the set; if "
            "its weights differ too, pictures are off",
            file=sys.stderr,
        )
    decoder = family.load_latent_decoder(model, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def paint(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        pixels = decoder.decode(torch.from_numpy(latents)[None], device)[0]  # [3, H, W] in [-1, 1]
        scaled = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())

    return paint
