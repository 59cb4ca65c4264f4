"""The trained tiny model draws what it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from qwen_lora.tiny_model import TRAINED
from tools.emoji_model.evaluate import draw, ranks_of_originals, read_emoji
from tools.emoji_model.vae import reconstruct

ORIGINALS = Path(__file__).parent / "flat-emoji"
SIDE = 64


@pytest.fixture(scope="module")
def pipeline() -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(str(TRAINED), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_original_is_the_nearest_of_sixteen(pipeline: QwenImagePipeline) -> None:
    emoji = read_emoji(ORIGINALS, SIDE)
    drawn = draw(pipeline, emoji.names, SIDE, seed=7)
    ranks = ranks_of_originals(drawn, range(len(emoji.names)), emoji)
    assert sum(rank == 0 for rank in ranks) >= 14  # 16 were found
    assert (drawn - emoji.pixels).abs().mean() < 0.2  # of 2: the whole range of [-1, 1]


def test_another_seed_draws_the_same_thing_and_another_prompt_another(
    pipeline: QwenImagePipeline,
) -> None:
    names = read_emoji(ORIGINALS, SIDE).names[:4]
    first, second = (draw(pipeline, names, SIDE, seed=seed) for seed in (1, 100))
    same = (first - second).abs().mean(dim=(1, 2, 3))
    other = (first - second.roll(1, dims=0)).abs().mean(dim=(1, 2, 3))
    assert not torch.equal(first, second)
    assert (same < 0.5 * other).all()


def test_the_vae_rebuilds_styles_that_it_has_and_has_not_seen(pipeline: QwenImagePipeline) -> None:
    emoji = read_emoji(ORIGINALS, SIDE)
    assert (reconstruct(pipeline.vae, emoji.rgba) - emoji.pixels).abs().mean() < 0.06  # 0.034
    unseen = []
    for file in sorted((TRAINED.parent / "demo-unseen").glob("*.webp")):
        with Image.open(file) as image:
            unseen.append(np.asarray(image.convert("RGBA").resize((SIDE, SIDE))))
    rgba = torch.from_numpy(np.stack(unseen)).permute(0, 3, 1, 2)
    white = rgba[:, 3:] / 255 * rgba[:, :3] / 255 + 1 - rgba[:, 3:] / 255  # [24, 3, S, S] in [0, 1]
    assert (reconstruct(pipeline.vae, rgba) - (2 * white - 1)).abs().mean() < 0.06


def test_the_weights_are_half_precision_and_small() -> None:
    files = [file for file in TRAINED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 21e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    for part in ("vae", "transformer", "text_encoder"):
        weights = next((TRAINED / part).glob("*.safetensors"))
        header = json.loads(
            weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")]
        )
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {
            "F16"
        }


def test_latent_statistics_were_measured(pipeline: QwenImagePipeline) -> None:
    """On 16 of the pictures: near 0 and 1 after normalisation, per channel."""
    emoji = read_emoji(ORIGINALS, SIDE)
    with torch.no_grad():
        latents = pipeline.vae.encode(emoji.pixels[:, :, None]).latent_dist.mode()
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    normalised = (latents - mean) / std
    assert normalised.mean(dim=(0, 2, 3, 4)).abs().max() < 0.35
    assert (normalised.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.3
