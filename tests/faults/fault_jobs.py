"""What is broken off: each job continues whatever an earlier, broken one left in its folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from qwen_lora.shards.previews import RgbMap
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.writer import (
    adoptable_shards,
    build_manifest,
    publish_manifest,
    sweep_temporaries,
    write_retired,
    write_rgb,
    write_unconditional,
)
from qwen_lora.train.checkpoint import (
    Checkpoint,
    CheckpointStore,
    RunFacts,
    TrainState,
    newest_good,
)
from tests.shards.conftest import CHANNELS, FINGERPRINT, SCALE, WIDTH, sorted_samples, write_one

torch.set_num_threads(1)
SAMPLES = sorted_samples(7)
CUTS = [SAMPLES[0:3], SAMPLES[3:6], SAMPLES[6:7]]


def write_set(folder: Path) -> None:
    """Three shards and everything else that a set has, as `precompute` goes about it."""
    import numpy as np

    sweep_temporaries(folder)
    kept = {
        tuple(row.sample_id for row in sidecar.rows): entry
        for entry, sidecar in adoptable_shards(folder, FINGERPRINT)
    }
    shards = [
        kept.get(tuple(sample.sample_id for sample in cut)) or write_one(folder, cut)
        for cut in CUTS
    ]
    generator = torch.Generator().manual_seed(99)
    unconditional = write_unconditional(
        folder,
        torch.randn(5, WIDTH, generator=generator).bfloat16(),
        torch.ones(5, dtype=torch.bool),
    )
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.03, (9 * CHANNELS, 3 * SCALE**2)).astype(np.float32)
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
        retired=write_retired(folder, [SAMPLES[0].sample_id]),
        rgb=write_rgb(folder, RgbMap(weight, np.full(3 * SCALE**2, 0.5, np.float32), SCALE, 0.1)),
    )
    publish_manifest(folder, manifest)


def make_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        facts=RunFacts({"learning_rate": 1e-4}, "float32", 2, "p" * 64, ("m",), ("f",), "b" * 64),
        state=TrainState(step=step, epoch_step=step, smoothed_loss=1 / 3),
        lora={"a.lora_A": torch.randn(64, 64, generator=generator)},
        optimizer_tensors={"a.lora_A/exp_avg": torch.randn(64, 64, generator=generator)},
        optimizer={"state": {"a.lora_A": {"exp_avg": {"__tensor__": "a.lora_A/exp_avg"}}}},
        scheduler={"last_epoch": step},
        scaler={},
    )


def save_checkpoints(folder: Path, steps: list[int], keep: int) -> None:
    """Sweep and go on after the newest sound checkpoint, as a restarted run does."""
    store = CheckpointStore(folder)
    store.sweep()
    found, _ = newest_good(store, "latest")
    for step in steps:
        if found is None or step > found.state.step:
            store.save(make_checkpoint(step), keep=keep)


def nothing(folder: Path) -> None:
    """For trying a tracer."""


def warm_up() -> None:
    """Imports and whatever else happens only once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "set")
        with ShardSet.open(Path(folder) / "set") as shard_set:
            shard_set.read(0)
        write_set(Path(folder) / "set")
        save_checkpoints(Path(folder) / "run", [1, 2], keep=1)
        save_checkpoints(Path(folder) / "run", [3], keep=1)


def precompute_set(folder: Path, one_thread: bool = True) -> None:
    from precompute_job import precompute_set as job

    job(folder, one_thread)


def precompute_remote(folder: Path, **arguments: Any) -> None:
    from precompute_job import precompute_remote as job

    job(folder, **arguments)


def warm_up_precompute() -> None:
    """As `warm_up`, for the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            precompute_set(Path(folder) / "set")


def train_run(folder: Path, **arguments: Any) -> int:
    from tests.resume.train_job import train_run as job

    return job(folder, **arguments)


def warm_up_train() -> None:
    """As `warm_up`, for `qwen-lora train`."""
    from tests.resume.train_job import warm_up as job

    job()
