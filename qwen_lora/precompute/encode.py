# ruff: noqa: TID253
"""One rank's share of the work: images and captions of planned shards to published shards.

Decoding runs on threads ahead of the encoders, writing on a thread behind them. Everything that an
encoder sees together belongs to one shard, so a record's bytes depend on its shard's plan alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.precompute.ahead import work_ahead
from qwen_lora.precompute.encoders import Encoders
from qwen_lora.precompute.fingerprint import LATENT_DTYPE
from qwen_lora.precompute.images import DecodeError, decode_image
from qwen_lora.precompute.plan import record_meta
from qwen_lora.precompute.previews import PromptPlan
from qwen_lora.precompute.stored import StoredParts, StoredReader
from qwen_lora.precompute.texts import (
    Caption,
    StoredText,
    Texts,
    TextStore,
    caption_batches,
    encode_captions,
    encode_prompts,
)
from qwen_lora.precompute.types import Skip, WorkItem
from qwen_lora.precompute.worklist import ShardPlan
from qwen_lora.precompute.write import BackgroundWriter
from qwen_lora.progress import Progress
from qwen_lora.shards.format import (
    UNCONDITIONAL_CAPTION,
    Fingerprint,
    ShardEntry,
)
from qwen_lora.shards.previews import PreviewPrompt
from qwen_lora.shards.store import Store
from qwen_lora.shards.writer import EncodedSample

Failures = dict[str, Skip]  # by sample id
Latents = dict[str, dict[str, torch.Tensor]]  # by sample id: tensors as stored
Pixels = Generator[tuple[WorkItem, "np.ndarray[Any, Any] | Skip"]]


@dataclass(frozen=True)
class Share:
    """What one rank is asked to do; `known_failures` are not decoded again."""

    shards: tuple[ShardPlan, ...]
    known_failures: Mapping[str, Skip]
    unconditional: bool  # this rank also encodes the empty prompt, if anything else
    prompts: PromptPlan  # of previews, likewise
    stored: StoredParts  # what the set holds of these shards; it is not encoded again


@dataclass
class Encoded:
    """What one rank has done."""

    entries: list[ShardEntry] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)
    failures: Failures = field(default_factory=dict)
    unconditional: StoredText | None = None
    prompts: list[PreviewPrompt] | None = None


@dataclass(frozen=True)
class Station:
    """Where and with what a rank encodes."""

    store: Store  # SHARDS
    local: Path  # SHARDS/.local
    settings: Settings
    fingerprint: Fingerprint
    made_by: Mapping[str, Any]
    encoders: Encoders
    quiet: bool = False  # only rank 0 shows progress
    check: Callable[[], None] = lambda: None  # raises when another rank failed


def encode_share(share: Share, station: Station, progress: Progress) -> Encoded:
    """Encode and publish the shards of one rank, in order.

    Samples that cannot be decoded or come out non-finite are left out and reported in `failures`.
    """
    done = Encoded()
    store = TextStore(station.local)
    sequential = station.encoders.placement != "together"
    if sequential:
        _encode_texts_first(share, station, store, done)
    with (
        closing(StoredReader(station.store, share.stored)) as stored,
        closing(_decode(share, station.settings)) as pixels,
        BackgroundWriter(station.store, station.fingerprint, dict(station.made_by)) as writer,
    ):
        for shard in share.shards:
            latents = _latents(shard, share, pixels, stored, station, done.failures)
            if latents:
                texts = _texts(shard, share, stored, station, store, done)
                samples = _build_samples(shard, latents, texts, station.settings, done.failures)
                writer.submit(samples)
                done.sample_ids += [sample.sample_id for sample in samples]
            progress.update(len(shard))
        done.entries = writer.finish()
    if sequential:
        for shard in share.shards:
            store.drop(_caption_batches(shard, share, station))
    return done


def encode_unconditional(station: Station) -> StoredText:
    """The empty prompt, alone in its batch: the same bytes in every set of these encoders."""
    encoded = station.encoders.text().encode([UNCONDITIONAL_CAPTION])[0]
    return StoredText(encoded.prompt_embeds.to(torch.bfloat16), encoded.prompt_mask)


def encode_preview_prompts(prompts: PromptPlan, station: Station) -> list[PreviewPrompt]:
    encoder = station.encoders.text()
    if not station.quiet:
        print(f"encoding {len(prompts)} preview prompts", file=sys.stderr)
    return encode_prompts(
        encoder,
        prompts,
        station.fingerprint.text_hash,
        station.settings.text_batch_size,
        station.check,
    )


def _encode_apart(share: Share, station: Station, done: Encoded) -> None:
    """What belongs to no shard, while the text encoder is there."""
    if share.unconditional and done.unconditional is None:
        done.unconditional = encode_unconditional(station)
    if share.prompts and done.prompts is None:
        done.prompts = encode_preview_prompts(share.prompts, station)


def _caption_batches(shard: ShardPlan, share: Share, station: Station) -> list[list[Caption]]:
    """The captions of a shard that the set does not hold yet."""
    return caption_batches(shard, station.settings.text_batch_size, share.stored.texts)


def _texts(
    shard: ShardPlan,
    share: Share,
    stored: StoredReader,
    station: Station,
    store: TextStore,
    done: Encoded,
) -> Texts:
    names = {name for item in shard for name in item.text_ids if name in share.stored.texts}
    texts = {name: stored.text(name) for name in sorted(names)}
    batches = _caption_batches(shard, share, station)
    if station.encoders.placement != "together" and (early := store.get(batches)) is not None:
        return texts | early
    _encode_apart(share, station, done)
    if batches:
        texts |= encode_captions(station.encoders.text(), batches, station.check)
    return texts


def _encode_texts_first(share: Share, station: Station, store: TextStore, done: Encoded) -> None:
    """All captions of the share into temporaries, then the text encoder's memory back."""
    shards = [shard for shard in share.shards if _has_hope(shard, share.known_failures)]
    with Progress("encoding captions", len(shards), "shards", quiet=station.quiet) as bar:
        for shard in shards:
            batches = _caption_batches(shard, share, station)
            _encode_apart(share, station, done)
            if batches and store.get(batches) is None:
                store.put(batches, encode_captions(station.encoders.text(), batches, station.check))
            bar.update()
    station.encoders.release_text()


def _has_hope(shard: ShardPlan, known_failures: Mapping[str, Skip]) -> bool:
    return any(item.sample_id not in known_failures for item in shard)


def by_bucket(shard: Iterable[WorkItem]) -> list[WorkItem]:
    """The order in which a shard's images are encoded: bucket, then sample id."""
    return sorted(shard, key=lambda item: (item.geometry.bucket, item.sample_id))


def _decode(share: Share, settings: Settings) -> Pixels:
    """Decoded images of all shards in encoding order, a bounded number ahead of the encoder."""
    data = settings.data_config
    latents = share.stored.latents
    tasks = (
        item for shard in share.shards for item in by_bucket(shard) if item.latent_id not in latents
    )
    return work_ahead(
        tasks,
        lambda item: share.known_failures.get(item.sample_id) or _decode_item(item, data),
        workers=settings.decode_workers,
        ahead=settings.decode_workers + 2 * settings.vae_batch_size,
    )


def _decode_item(item: WorkItem, data: DataConfig) -> np.ndarray[Any, Any] | Skip:
    name = item.inspection.candidate.image.name
    try:
        return decode_image(item.inspection, item.geometry, data)  # [H, W, 3] uint8
    except DecodeError as error:
        return Skip(name, error.reason, error.detail)
    except OSError as error:
        return Skip(name, "unreadable", error.strerror or type(error).__name__)


def _latents(
    shard: ShardPlan,
    share: Share,
    pixels: Pixels,
    stored: StoredReader,
    station: Station,
    failures: Failures,
) -> Latents:
    """Those that the set holds are copied; the others are encoded in batches of `vae_batch_size`
    inside each bucket, in sample-id order."""
    latents: Latents = {}
    settings = station.settings
    for _, group in groupby(by_bucket(shard), key=lambda item: item.geometry.bucket):
        batch: list[tuple[WorkItem, np.ndarray[Any, Any]]] = []
        for item in group:
            if item.latent_id in share.stored.latents:
                if item.sample_id in share.known_failures:  # its captions cannot be encoded
                    failures[item.sample_id] = share.known_failures[item.sample_id]
                else:
                    latents[item.sample_id] = stored.latent(item.latent_id)
                continue
            decoded_item, result = next(pixels)
            assert decoded_item is item
            if isinstance(result, Skip):
                failures[item.sample_id] = result
                continue
            batch.append((item, result))
            if len(batch) == settings.vae_batch_size:
                _encode_batch(batch, station, latents, failures)
                batch = []
        if batch:
            _encode_batch(batch, station, latents, failures)
    return latents


def _encode_batch(
    batch: Sequence[tuple[WorkItem, np.ndarray[Any, Any]]],
    station: Station,
    latents: Latents,
    failures: Failures,
) -> None:
    station.check()
    images = torch.from_numpy(np.stack([image for _, image in batch]))  # [B, H, W, 3] uint8
    images = images.to(station.encoders.device).permute(0, 3, 1, 2).contiguous()
    pixels = images.float() / 255.0 * 2.0 - 1.0  # [B, 3, H, W] in [-1, 1]
    encoded = station.encoders.latent().encode(pixels)
    for index, (item, _) in enumerate(batch):
        tensors = stored_latents(
            encoded.mean[index], encoded.std[index], station.settings.vae_posterior
        )
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            latents[item.sample_id] = tensors
        else:
            failures[item.sample_id] = Skip(
                item.inspection.candidate.image.name,
                "nonfinite",
                f"the VAE's latents are not finite in {LATENT_DTYPE}",
            )


def stored_latents(
    mean: torch.Tensor, std: torch.Tensor, posterior: str
) -> dict[str, torch.Tensor]:
    """mean, std: [C, h, w] float32, normalised -> the record's tensors in float16."""
    dtype = getattr(torch, LATENT_DTYPE)
    if posterior == "mode":
        return {"latents": mean.to(dtype).contiguous()}
    return {
        "posterior_mean": mean.to(dtype).contiguous(),
        "posterior_std": std.to(dtype).contiguous(),
    }


def _build_samples(
    shard: ShardPlan, latents: Latents, texts: Texts, settings: Settings, failures: Failures
) -> list[EncodedSample]:
    """Records in sample-id order; a sample with a non-finite embedding is refused."""
    broken = {name for name, text in texts.items() if not text.finite()}
    samples = []
    for item in shard:
        if item.sample_id not in latents:
            continue
        if broken.intersection(item.text_ids):
            failures[item.sample_id] = Skip(
                item.inspection.candidate.image.name,
                "nonfinite",
                "the text encoder's embedding is not finite",
            )
            continue
        tensors = dict(latents[item.sample_id])
        for number, name in enumerate(item.text_ids):
            text = texts[name]
            if name in item.text_ids[:number]:  # a caption given twice: safetensors shares nothing
                text = StoredText(text.prompt_embeds.clone(), text.prompt_mask.clone())
            tensors[f"prompt_embeds.{number}"] = text.prompt_embeds  # [T, D] bf16
            tensors[f"prompt_mask.{number}"] = text.prompt_mask  # [T] bool
        samples.append(
            EncodedSample(
                sample_id=item.sample_id,
                latent_id=item.latent_id,
                text_ids=item.text_ids,
                token_counts=item.token_counts,
                meta=record_meta(item.inspection, item.geometry, item.truncated_tokens, settings),
                tensors=tensors,
            )
        )
    return samples
