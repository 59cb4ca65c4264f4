"""Both stages together learn: eight emoji, measured with fixed noise at fixed noise levels."""

import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.precompute.run import precompute
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train

STEPS = 400


@pytest.fixture(scope="module")
def emoji_shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    bundled = files("qwen_lora") / "assets" / "demo-images"
    for image in sorted(Path(str(bundled)).glob("*.webp"))[:8]:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)
    shards = folder.parent / "emoji-shards"
    summary = precompute(
        Settings(
            pretrained_model_name_or_path=str(tiny_model),
            data_config=DataConfig(img_dir=folder, img_size=[64]),
            shards_dir=shards,
            encode_threads=1,
        )
    )
    assert summary.written == 8
    return shards


@pytest.mark.parametrize(
    ("targets", "at_least"),
    [("attention", 0.30), pytest.param("all-linear", 0.40, marks=pytest.mark.slow)],
)
def test_overfitting_eight_emoji(
    targets: str, at_least: float, emoji_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    result = train(
        Settings(
            pretrained_model_name_or_path=str(tiny_model),
            data_config=DataConfig(caption_dropout_rate=0.0),
            shards_dir=emoji_shards,
            output_dir=tmp_path / "run",
            train_batch_size=8,
            max_train_steps=STEPS,
            learning_rate=3e-3,
            lora_targets=targets,
            gradient_checkpointing=False,
            validation_steps=STEPS,
        )
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    measured = {row["step"]: row["fixed_train_loss"] for row in rows if "fixed_train_loss" in row}
    assert set(measured) == {0, STEPS} and result.steps == STEPS
    assert 1 - measured[STEPS] / measured[0] >= at_least
