"""What lets training show pictures without a VAE: a linear map from latents to RGB, and prompts.

    rgb-<sha256[:12]>.json                the map, fitted to the set's own images
    previews-<sha256[:12]>.safetensors    preview prompts with their embeddings

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RgbMap:
    """RGB of the `scale` x `scale` pixels of a latent position, linear in its 3 x 3 neighbourhood.

    C latent channels, normalised latents as in the records.
    """

    weight: NDArray[np.float32]  # [9 * C, 3 * scale * scale]
    bias: NDArray[np.float32]  # [3 * scale * scale]
    scale: int  # pixels a side of what one latent position becomes
    mean_abs_error: float  # on the images it was fitted to, of RGB in [0, 1]

    def apply(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[C, h, w] -> RGB [h * scale, w * scale, 3]; borders repeat their edge."""
        channels, height, width = latents.shape
        padded = np.pad(latents, ((0, 0), (1, 1), (1, 1)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        rows = windows.transpose(1, 2, 0, 3, 4).reshape(height * width, 9 * channels)
        rgb = (rows @ self.weight + self.bias).reshape(height, width, 3, self.scale, self.scale)
        image = rgb.transpose(0, 3, 1, 4, 2).reshape(height * self.scale, width * self.scale, 3)
        return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class PreviewPrompt:
    """A prompt that previews draw, encoded by stage 1."""

    prompt: str
    prompt_embeds: torch.Tensor  # [T, D] bf16
    prompt_mask: torch.Tensor  # [T] bool
