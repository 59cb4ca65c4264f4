"""Small real shard sets with random tensors, written by the project's own writer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from qwen_lora.shards.format import (
    Fingerprint,
    Geometry,
    Manifest,
    RecordMeta,
    latent_id,
    sample_id,
    text_id,
)
from qwen_lora.shards.writer import (
    EncodedSample,
    publish_manifest,
    write_shard,
    write_unconditional,
)

CHANNELS, WIDTH = 16, 128
SIZES = [(8, 8), (8, 12)]  # latent pixels


def make_sample(number: int, fingerprint: Fingerprint, posterior: str) -> EncodedSample:
    """Two captions each, sizes alternating."""
    generator = torch.Generator().manual_seed(number)
    height, width = SIZES[number % len(SIZES)]
    bucket = (height * 8, width * 8)
    source = hashlib.sha256(str(number).encode()).hexdigest()
    captions = [f"caption {number}", f"other caption {number}"]
    tokens = [3 + number % 5, 9 + number % 3]
    shape = (CHANNELS, height, width)
    latents = torch.randn(shape, generator=generator).half()
    if posterior == "mode":
        tensors = {"latents": latents}
    else:
        std = torch.rand(shape, generator=generator).half()
        tensors = {"posterior_mean": latents, "posterior_std": std}
    for index, count in enumerate(tokens):
        embeds = torch.randn(count, WIDTH, generator=generator).bfloat16()
        tensors[f"prompt_embeds.{index}"] = embeds
        tensors[f"prompt_mask.{index}"] = torch.ones(count, dtype=torch.bool)
    geometry = Geometry(crop_box=(0, 0, *bucket), bucket=bucket)
    latent = latent_id(source, geometry, fingerprint.vae_hash)
    texts = [text_id(caption, fingerprint.text_hash) for caption in captions]
    meta = RecordMeta(
        captions=captions,
        source=f"{number}.png",
        source_sha256=source,
        original_size=bucket,
        crop_box=geometry.crop_box,
        flipped=False,
        bucket=bucket,
        truncated_tokens=[0, 0],
        group="",
    )
    return EncodedSample(sample_id(latent, texts), latent, texts, tokens, meta, tensors)


def write_set(folder: Path, count: int, *, posterior: str = "mode", per_shard: int = 4) -> Path:
    """A shard set of `count` samples in shards of `per_shard`."""
    fingerprint = Fingerprint("qwen-image", vae={"posterior": posterior}, text={"limit": 1024})
    samples = [make_sample(number, fingerprint, posterior) for number in range(count)]
    samples.sort(key=lambda sample: sample.sample_id)
    folder.mkdir(parents=True, exist_ok=True)
    shards = tuple(
        write_shard(folder, samples[start : start + per_shard], fingerprint, {"qwen_lora": "test"})
        for start in range(0, count, per_shard)
    )
    generator = torch.Generator().manual_seed(99)
    unconditional = write_unconditional(
        folder,
        torch.randn(6, WIDTH, generator=generator).bfloat16(),
        torch.ones(6, dtype=torch.bool),
    )
    manifest = Manifest(
        fingerprint=fingerprint,
        latent_channels=CHANNELS,
        latent_scale=8,
        text_width=WIDTH,
        posterior=posterior,
        model={"id": "test", "revision": None},
        recipe={"img_size": [64]},
        shards=shards,
        unconditional=unconditional,
        counts={"samples": count, "images": count, "captions": 2 * count, "retired": 0},
        histograms={},
    )
    publish_manifest(folder, manifest)
    return folder
