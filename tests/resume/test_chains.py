"""A run that is interrupted five times in a row ends with the bytes of one that was not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.resume.runs import Runs, assert_same_end, discard, tally
from tests.shards.fault_server import FAULTS, serve

pytestmark = pytest.mark.multiprocess
URL = "url"
# No hash is known of manifest.json itself: changed on the way it ends a start with an error.
PASSING = [fault for fault in FAULTS if fault not in ("flipped", "cut-silently")]
Case = tuple[dict[str, Any], Callable[[], None]]


def variant(name: str, sets: dict[str, Path]) -> dict[str, Any]:
    """Settings of one way of training."""
    return {
        "plain": {},
        "dropout-cosine": {"lora_dropout": 0.1, "lr_scheduler": "cosine", "lr_warmup_steps": 3},
        "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
        "caption-dropout": {"data_config": {"caption_dropout_rate": 0.5}},
        "posterior": {"shards_dir": str(sets["posterior"])},
        "weights": {
            "shards": [
                {"path": str(sets["plain"]), "weight": 0.7},
                {"path": str(sets["other"]), "weight": 2.5},
            ]
        },
        "repeats": {
            "shards_dir": str(sets["groups"]),
            "data_config": {"kohya_repeats": True, "group_weights": {"fox": 1.3}},
        },
        "block": {"shards_dir": str(sets["many-shards"]), "shuffle": "block"},
        "validation": {"validation_fraction": 0.3, "validation_steps": 4},
        "previews": {
            "shards_dir": str(sets["many-shards"]),
            "preview_steps": 4,
            "preview_inference_steps": 2,
        },
        "bf16-8bit": {
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "lora_targets": "all-linear+mod",
            "optimizer": "adamw8bit",
            "optimizer_args": {"min_8bit_size": 64},
        },
        "prodigy": {
            "optimizer": "prodigy",
            "learning_rate": 1.0,
            "lora_init": "orthogonal",
            "timestep_sampling": "logit_normal",
            "timestep_shift": "model",
        },
        "fp16": {"mixed_precision": "fp16", "loss_weighting": "cosmap"},
        # Several at once, so that the fast suite meets them all.
        "much": {
            "shards_dir": str(sets["posterior"]),
            "lora_dropout": 0.1,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "gradient_accumulation_steps": 2,
            "data_config": {"caption_dropout_rate": 0.5},
            "validation_fraction": 0.3,
            "validation_steps": 4,
        },
        "more": {
            "shards": [
                {"path": str(sets["many-shards"]), "weight": 0.7},
                {"path": str(sets["other"]), "weight": 1.5},
            ],
            "data_config": {"kohya_repeats": True},
            "shuffle": "block",
            "preview_steps": 5,
            "preview_inference_steps": 2,
        },
    }[name]


@contextmanager
def opened_case(
    name: str, sets: dict[str, Path], scratch: Path, rng: random.Random
) -> Iterator[Case]:
    """The settings, and what happens before each resume."""
    if name != URL:
        yield variant(name, sets), lambda: None
        return
    cache = scratch / "cache"
    with serve(sets["plain"]) as server:

        def spoil() -> None:
            shutil.rmtree(cache, ignore_errors=True)
            server.script = rng.choices(PASSING, k=5)  # fewer than the attempts in a row

        yield {"shards": [{"path": server.url}], "shard_cache_dir": str(cache)}, spoil


VARIANTS = (
    *("plain", "dropout-cosine", "accumulation", "caption-dropout", "posterior", "weights"),
    *("repeats", "block", "validation", "previews", "bf16-8bit", "prodigy", "fp16", URL),
)
NEEDS = {"bf16-8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def run_chains(
    name: str,
    count: int,
    runs: Runs,
    sets: dict[str, Path],
    scratch: Path,
    rng: random.Random,
    world: int = 1,
    **chain: Any,
) -> list[str]:
    """`count` chains of five against one unbroken run; the interrupts."""
    said = []
    with opened_case(name, sets, scratch, rng) as (changes, between):
        runs.run(scratch / "unbroken", changes, world=world)
        for _ in range(count):
            happened = runs.chain(
                scratch / "broken", changes, rng, between=between, world=world, **chain
            )
            assert_same_end(scratch / "unbroken", scratch / "broken", f"{name}: {happened}")
            discard(scratch / "broken")
            said += happened
    return said


@pytest.mark.parametrize("name", ["much", "more", URL])
def test_five_interrupts_in_a_row(
    runs: Runs, sets: dict[str, Path], tmp_path: Path, rng: random.Random, name: str
) -> None:
    run_chains(name, 1, runs, sets, tmp_path, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_chains_of_every_variant(
    runs: Runs, sets: dict[str, Path], tmp_path: Path, rng: random.Random, name: str
) -> None:
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    said = run_chains(name, 6, runs, sets, tmp_path, rng)
    print(f"{name}: {len(said)} interrupts in chains of 5, 0 differing bytes: {tally(said)}")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(0, 1), (4, 1), (4, 2)], ids=["0", "1", "2"])
def test_fifty_interrupts_with_each_number_of_workers(
    runs: Runs,
    sets: dict[str, Path],
    tmp_path: Path,
    rng: random.Random,
    workers: tuple[int, int],
) -> None:
    """read_ahead 0 is no worker: the training thread reads."""
    said = run_chains("plain", 10, runs, sets, tmp_path, rng, workers=lambda _: workers)
    print(f"workers {workers}: {len(said)} interrupts, 0 differing bytes: {tally(said)}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_chains_of_several_ranks(
    runs: Runs, sets: dict[str, Path], tmp_path: Path, rng: random.Random, world: int
) -> None:
    """Bit-equal with the same number of ranks, whichever of them gets the signal."""
    said = run_chains("much", 3, runs, sets, tmp_path, rng, world=world)
    print(f"{world} ranks: {len(said)} interrupts, 0 differing bytes: {tally(said)}")
