"""Shard sets in memory, with the columns that a plan reads and nothing on a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class StandInSample:
    sample_id: str
    bucket: tuple[int, int] = (64, 64)
    tokens: tuple[int, ...] = (10,)
    group: str = ""
    source_sha256: str = ""


def make_samples(count: int, seed: int = 0, **fixed: Any) -> list[StandInSample]:
    """Random samples; `fixed` overrides fields."""
    rng = np.random.default_rng(seed)
    buckets = [(64, 64), (64, 96), (96, 64), (128, 48)]
    samples = []
    for number in range(count):
        name = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()
        sample = StandInSample(
            sample_id=name[:32],
            bucket=buckets[rng.integers(len(buckets))],
            tokens=tuple(int(n) for n in rng.integers(1, 400, size=rng.integers(1, 4))),
            source_sha256=name,
        )
        samples.append(replace(sample, **fixed))
    return samples


def make_set(
    samples: Sequence[StandInSample], *, per_shard: int = 7, family: str = "qwen-image"
) -> Any:
    """A set that lists the samples in the order given, `per_shard` in each shard."""
    shards = -(-len(samples) // per_shard)
    counts = [len(sample.tokens) for sample in samples]
    table = SimpleNamespace(
        sample_id=[sample.sample_id for sample in samples],
        source_sha256=[sample.source_sha256 for sample in samples],
        group=[sample.group for sample in samples],
        bucket=np.array([sample.bucket for sample in samples], np.int32).reshape(-1, 2),
        shard=np.arange(len(samples), dtype=np.int32) // per_shard,
        token_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        token_counts=np.array([n for sample in samples for n in sample.tokens], np.int32),
    )
    content = [
        "".join(sample.sample_id for sample in samples[k * per_shard : (k + 1) * per_shard])
        for k in range(shards)
    ]
    hashes = [hashlib.sha256(ids.encode()).hexdigest() for ids in content]
    manifest = SimpleNamespace(
        fingerprint=SimpleNamespace(family=family),
        latent_channels=16,
        text_width=32,
        shards=[SimpleNamespace(tar=SimpleNamespace(sha256=value)) for value in hashes],
    )
    empty = (torch.zeros(6, 32, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bool))
    return SimpleNamespace(table=table, manifest=manifest, unconditional=lambda: empty)
