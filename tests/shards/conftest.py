"""Small shard sets with random tensors: no model is needed to test a format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from qwen_lora.shards.format import (
    Fingerprint,
    Geometry,
    RecordMeta,
    ShardEntry,
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

CHANNELS, SCALE, WIDTH = 16, 8, 32
FINGERPRINT = Fingerprint("qwen-image", vae={"weights": ["a"]}, text={"weights": ["b"]})


def make_sample(number: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(number)
    bucket = [(64, 64), (48, 96)][number % 2]
    source = hashlib.sha256(str(number).encode()).hexdigest()
    captions = [f"caption {number} \u00e9", f"another {number}"][: 1 + number % 2]
    tokens = tuple(4 + number % 7 + index for index in range(len(captions)))
    geometry = Geometry((0, 0, *bucket), bucket)
    latent = latent_id(source, geometry, FINGERPRINT.vae_hash)
    texts = tuple(text_id(caption, FINGERPRINT.text_hash) for caption in captions)
    shape = (CHANNELS, bucket[0] // SCALE, bucket[1] // SCALE)
    tensors = {"latents": torch.randn(shape, generator=generator).half()}
    for index, count in enumerate(tokens):
        embeds = torch.randn(count, WIDTH, generator=generator).bfloat16()
        tensors[f"prompt_embeds.{index}"] = embeds
        tensors[f"prompt_mask.{index}"] = torch.ones(count, dtype=torch.bool)
    meta = RecordMeta(
        captions=captions,
        source=f"folder/{number}.png",
        source_sha256=source,
        original_size=bucket,
        crop_box=geometry.crop_box,
        flipped=False,
        bucket=bucket,
        truncated_tokens=[0] * len(captions),
        group="folder",
    )
    return EncodedSample(sample_id(latent, list(texts)), latent, texts, tokens, meta, tensors)


def sorted_samples(count: int, first: int = 0) -> list[EncodedSample]:
    samples = [make_sample(number) for number in range(first, first + count)]
    return sorted(samples, key=lambda sample: sample.sample_id)


def write_one(folder: Path, samples: list[EncodedSample]) -> ShardEntry:
    return write_shard(folder, samples, FINGERPRINT, {"qwen_lora": "test"})


def publish(folder: Path, shards: list[ShardEntry], **changes: object) -> str:
    generator = torch.Generator().manual_seed(99)
    unconditional = write_unconditional(
        folder,
        torch.randn(5, WIDTH, generator=generator).bfloat16(),
        torch.ones(5, dtype=torch.bool),
    )
    manifest = build_manifest(
        folder,
        shards=shards,
        fingerprint=FINGERPRINT,
        latent_channels=CHANNELS,
        latent_scale=SCALE,
        text_width=WIDTH,
        posterior="mode",
        model={"id": "some/model", "revision": None},
        recipe={"img_size": [64]},
        unconditional=unconditional,
        **changes,  # type: ignore[arg-type]
    )
    return publish_manifest(folder, manifest)


def write_set(folder: Path, count: int = 9, per_shard: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    samples = sorted_samples(count)
    cuts = [samples[start : start + per_shard] for start in range(0, count, per_shard)]
    publish(folder, [write_one(folder, cut) for cut in cuts])
    return folder


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    """9 samples in 3 shards, in a folder that the test may damage."""
    return write_set(tmp_path / "shards")
