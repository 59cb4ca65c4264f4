"""Settings of a small stage 1 run, and shard sets compared byte by byte."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.families.qwen_image import QwenImage


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
def within_seconds() -> Iterator[None]:
    """A test that waits for ever fails after 10 s instead. POSIX only."""

    def late(*_: object) -> None:
        raise TimeoutError("this waited for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def published() -> Callable[[Path], dict[str, bytes]]:
    """`published(folder)`: every file of a shard set that others see, by name."""
    return lambda folder: {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
    }


@pytest.fixture
def dataset(tmp_path: Path, image_folder: Path) -> Path:
    """Four of the images with captions, in a folder that a test may change."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for path in sorted(image_folder.iterdir())[:8]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def no_encoders(monkeypatch: pytest.MonkeyPatch):
    """A call makes every later load of an encoder fail the test."""

    def forbid() -> None:
        def refuse(*args, **kwargs):
            raise AssertionError("an encoder was loaded")

        monkeypatch.setattr(QwenImage, "load_prompt_encoder", refuse)
        monkeypatch.setattr(QwenImage, "load_latent_encoder", refuse)

    return forbid
