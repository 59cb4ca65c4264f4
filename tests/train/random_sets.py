"""Shard sets of random tensors that fit the tiny model, written by the project's own writer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.shards.format import (
    Fingerprint,
    Geometry,
    Manifest,
    RecordMeta,
    latent_id,
    sample_id,
    text_id,
)
from qwen_lora.shards.previews import PreviewPrompt, RgbMap
from qwen_lora.shards.writer import (
    EncodedSample,
    publish_manifest,
    write_previews,
    write_rgb,
    write_shard,
    write_unconditional,
)
from qwen_lora.tiny_model.build import TEXT_WIDTH

CHANNELS, SCALE = 16, 8
SIZES = [(4, 4), (4, 8)]  # latent pixels
MakeSettings = Callable[..., Settings]


def random_map() -> RgbMap:
    """Random colours that follow the latents."""
    rng = np.random.default_rng(0)
    patch = 3 * SCALE**2
    weight = rng.normal(0, 0.03, (9 * CHANNELS, patch)).astype(np.float32)
    return RgbMap(weight, np.full(patch, 0.5, np.float32), SCALE, 0.1)


def random_prompts(texts: Sequence[str]) -> list[PreviewPrompt]:
    generator = torch.Generator().manual_seed(5)
    return [
        PreviewPrompt(
            text,
            torch.randn(4 + number, TEXT_WIDTH, generator=generator).bfloat16(),
            torch.ones(4 + number, dtype=torch.bool),
        )
        for number, text in enumerate(texts)
    ]


def random_set(
    folder: Path,
    count: int,
    *,
    vae: str = "tiny",
    per_shard: int = 4,
    rgb: RgbMap | None = None,
    prompts: Sequence[PreviewPrompt] = (),
    texts: Sequence[str] | None = ("picture {}", "number {}"),
    posterior: Literal["mode", "mean_std"] = "mode",
    groups: Sequence[str] = ("",),
    first: int = 0,
) -> Path:
    """`count` of an endless row of samples: sizes alternate, one or two captions each.
    texts: what the captions say, None for a set without captions and names. groups: taken in turn.
    """
    vae_facts = {"name": vae} | ({} if posterior == "mode" else {"posterior": posterior})
    fingerprint = Fingerprint("qwen-image", vae=vae_facts, text={"limit": 1024})
    samples = sorted(
        (
            _sample(number, fingerprint, texts, posterior, groups[number % len(groups)])
            for number in range(first, first + count)
        ),
        key=lambda s: s.sample_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    shards = tuple(
        write_shard(folder, samples[start : start + per_shard], fingerprint, {"by": "a test"})
        for start in range(0, count, per_shard)
    )
    generator = torch.Generator().manual_seed(99)
    unconditional = write_unconditional(
        folder,
        torch.randn(3, TEXT_WIDTH, generator=generator).bfloat16(),
        torch.ones(3, dtype=torch.bool),
    )
    captions = sum(len(sample.text_ids) for sample in samples)
    manifest = Manifest(
        fingerprint=fingerprint,
        latent_channels=CHANNELS,
        latent_scale=SCALE,
        text_width=TEXT_WIDTH,
        posterior=posterior,
        model={"id": "tiny", "revision": None},
        recipe={"img_size": [32]},
        shards=shards,
        unconditional=unconditional,
        counts={
            "samples": count,
            "images": count,
            "captions": captions,
            "retired": 0,
            "bytes": sum(shard.tar.bytes for shard in shards),
        },
        histograms={"buckets": {}, "tokens": {}, "groups": {}},
        rgb=write_rgb(folder, rgb) if rgb else None,
        previews=write_previews(folder, prompts) if prompts else None,
    )
    publish_manifest(folder, manifest)
    return folder


def _sample(
    number: int,
    fingerprint: Fingerprint,
    texts: Sequence[str] | None,
    posterior: str,
    group: str,
) -> EncodedSample:
    generator = torch.Generator().manual_seed(number)
    height, width = SIZES[number % len(SIZES)]
    bucket = (height * SCALE, width * SCALE)
    source = hashlib.sha256(str(number).encode()).hexdigest()
    named = [text.format(number) for text in texts or ("picture {}", "number {}")]
    captions = named[: 1 + number % 2]
    latents = torch.randn(CHANNELS, height, width, generator=generator).half()
    if posterior == "mode":
        tensors = {"latents": latents}
    else:
        tensors = {"posterior_mean": latents, "posterior_std": latents.abs() / 4}
    tokens = [2 + (number + index) % 4 for index in range(len(captions))]
    for index, count in enumerate(tokens):
        embeds = torch.randn(count, TEXT_WIDTH, generator=generator).bfloat16()
        tensors[f"prompt_embeds.{index}"] = embeds  # [T, D]
        tensors[f"prompt_mask.{index}"] = torch.ones(count, dtype=torch.bool)
    geometry = Geometry(crop_box=(0, 0, *bucket), bucket=bucket)
    latent = latent_id(source, geometry, fingerprint.vae_hash)
    text_ids = [text_id(caption, fingerprint.text_hash) for caption in captions]
    meta = RecordMeta(
        captions=None if texts is None else captions,
        source=None if texts is None else f"{number}.png",
        source_sha256=source,
        original_size=bucket,
        crop_box=geometry.crop_box,
        flipped=False,
        bucket=bucket,
        truncated_tokens=[0] * len(captions),
        group=group,
    )
    return EncodedSample(sample_id(latent, text_ids), latent, text_ids, tokens, meta, tensors)
