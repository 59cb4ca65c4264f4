"""Shard sets of random tensors in the tiny model's widths, and settings to train on them."""

from pathlib import Path
from typing import Any

import pytest
from random_sets import MakeSettings, random_set

from qwen_lora.config.schema import Settings


@pytest.fixture(scope="session")
def train_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 samples in two buckets; tests must not change it."""
    return random_set(tmp_path_factory.mktemp("train") / "shards", 9)


@pytest.fixture
def make_settings(train_shards: Path, transformer_only: Path, tmp_path: Path) -> MakeSettings:
    """Settings of a short run in tmp_path/<output>; data_<key> goes to data_config."""

    def make(output: str = "run", **changes: Any) -> Settings:
        data = {k.removeprefix("data_"): changes.pop(k) for k in [*changes] if "data_" in k}
        values: dict[str, Any] = {
            "shards_dir": train_shards,
            "pretrained_model_name_or_path": str(transformer_only),
            "output_dir": tmp_path / output,
            "rank": 4,
            "max_train_steps": 20,
            "train_batch_size": 2,
            "checkpointing_steps": 5,
            "validation_steps": 0,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "data_config": data,
        }
        return Settings(**{**values, **changes})

    return make
