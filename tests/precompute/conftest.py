"""Settings of a small stage 1 run, and shard sets compared byte by byte."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_lora.config.schema import DataConfig, Settings


@pytest.fixture
def make_settings(tiny_model: Path, image_folder: Path, tmp_path: Path) -> Callable[..., Settings]:
    """`make_settings(data={...}, **settings)`: shards of 4 samples, batches of 2 and 3."""

    def make(data: dict | None = None, **changes: object) -> Settings:
        facts = {
            "pretrained_model_name_or_path": str(tiny_model),
            "data_config": DataConfig(
                **{"img_dir": image_folder, "img_size": [96], **(data or {})}
            ),
            "shards_dir": tmp_path / "shards",
            "encode_threads": 1,
            "decode_workers": 2,
            "vae_batch_size": 2,
            "text_batch_size": 3,
            "shard_max_samples": 4,
        }
        return Settings(**{**facts, **changes})

    return make


@pytest.fixture
def published() -> Callable[[Path], dict[str, bytes]]:
    """`published(folder)`: every file of a shard set that others see, by name."""
    return lambda folder: {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
    }
