"""Shard sets with random tensors of real sizes, made by the project's own writer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from qwen_lora.shards.format import (
    Fingerprint,
    Geometry,
    RecordMeta,
    latent_id,
    sample_id,
    text_id,
)
from qwen_lora.shards.writer import (
    EncodedSample,
    build_manifest,
    publish_manifest,
    write_shard,
    write_unconditional,
)

CHANNELS, SCALE, WIDTH = 16, 8, 3584  # Qwen-Image's
FINGERPRINT = Fingerprint("qwen-image", vae={"benchmark": 1}, text={"benchmark": 1})


def encoded_sample(number: int, px: int, tokens: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(number)
    source = hashlib.sha256(str(number).encode()).hexdigest()
    geometry = Geometry((0, 0, px, px), (px, px))
    caption = f"caption {number}"
    latent = latent_id(source, geometry, FINGERPRINT.vae_hash)
    texts = (text_id(caption, FINGERPRINT.text_hash),)
    side = px // SCALE
    tensors = {
        "latents": torch.randn(CHANNELS, side, side, generator=generator).half(),
        "prompt_embeds.0": torch.randn(tokens, WIDTH, generator=generator).bfloat16(),
        "prompt_mask.0": torch.ones(tokens, dtype=torch.bool),
    }
    meta = RecordMeta(
        captions=[caption],
        source=f"{number}.jpg",
        source_sha256=source,
        original_size=(px, px),
        crop_box=geometry.crop_box,
        flipped=False,
        bucket=(px, px),
        truncated_tokens=[0],
        group="",
    )
    return EncodedSample(sample_id(latent, list(texts)), latent, texts, (tokens,), meta, tensors)


def write_set(folder: Path, count: int, px: int, tokens: int, per_shard: int = 32) -> None:
    """`count` samples of px x px pixels with captions of `tokens` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [encoded_sample(number, px, tokens) for number in range(count)]
    samples.sort(key=lambda sample: sample.sample_id)
    shards = [
        write_shard(folder, samples[start : start + per_shard], FINGERPRINT, {})
        for start in range(0, count, per_shard)
    ]
    unconditional = write_unconditional(
        folder, torch.zeros(6, WIDTH).bfloat16(), torch.ones(6, dtype=torch.bool)
    )
    manifest = build_manifest(
        folder,
        shards=shards,
        fingerprint=FINGERPRINT,
        latent_channels=CHANNELS,
        latent_scale=SCALE,
        text_width=WIDTH,
        posterior="mode",
        model={"id": "benchmark/none", "revision": None},
        recipe={},
        unconditional=unconditional,
    )
    publish_manifest(folder, manifest)
