"""Shard sets of every kind that training reads, and a fork server that has trained once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_points import ForkServer
from tests.resume.runs import Runs
from tests.train.random_sets import random_map, random_prompts, random_set


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name; tests must not change them."""
    folder = tmp_path_factory.mktemp("sets")
    pictures: dict[str, Any] = {"rgb": random_map(), "prompts": random_prompts(["a", "b"])}
    return {
        "plain": random_set(folder / "plain", 9),
        "other": random_set(folder / "other", 6, first=5, groups=("2_cat", "3_dog")),
        "posterior": random_set(folder / "posterior", 9, posterior="mean_std"),
        "groups": random_set(folder / "groups", 9, groups=("2_cat", "1_dog", "fox")),
        "many-shards": random_set(folder / "many-shards", 20, per_shard=1, **pictures),
    }


@pytest.fixture(scope="session")
def base(sets: dict[str, Path], transformer_only: Path) -> dict[str, Any]:
    """Settings of a short run, as a file has them."""
    return {
        "pretrained_model_name_or_path": str(transformer_only),
        "shards_dir": str(sets["plain"]),
        "rank": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 16,
        "checkpointing_steps": 3,
        "logging_steps": 2,
        "validation_steps": 0,
        "preview_steps": 0,
        "gradient_checkpointing": False,
    }


@pytest.fixture(scope="session")
def runs(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    server = ForkServer(
        tmp_path_factory.mktemp("server"),
        ("warm_up_train",),
        RESUME_SETTINGS=json.dumps(base),
        CUDA_VISIBLE_DEVICES="",  # a process that has used a GPU cannot fork
    )
    yield Runs(server, base)
    server.close()


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw no loss.png, which takes longer than their steps."""
    monkeypatch.setattr("qwen_lora.train.plot.plot_loss", lambda *_: None)


@pytest.fixture
def rng(request: pytest.FixtureRequest, fault_seed: int) -> random.Random:
    """Random choices that `--fault-seed` replays."""
    return random.Random(f"{fault_seed} {request.node.name}")
