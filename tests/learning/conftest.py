"""The trained tiny model with its 64 pictures in 3D style, as a shard set, and short runs on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.demo.run import IMAGES, MODEL, SIDE, TRIGGER, prompt
from qwen_lora.precompute.run import precompute
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train

STEPS = 60
PREVIEWED = "cloud with lightning"


@dataclass(frozen=True)
class Run:
    """A finished run and what it measured on held-out pictures."""

    path: Path
    lora: Path
    held_out: dict[int, float]  # validation_loss by step

    @property
    def gain(self) -> float:
        """The share of the base's held-out loss that is gone at the end."""
        return 1 - self.held_out[max(self.held_out)] / self.held_out[0]

    @property
    def train_loss(self) -> float:
        """The last line's mean loss over training pictures."""
        losses = [row["loss"] for row in read_metrics(self.path / "metrics.jsonl") if "loss" in row]
        return float(losses[-1])


Learn = Callable[..., Run]


@pytest.fixture(scope="session")
def style_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures; 16 of them are held out at validation_fraction 0.25."""
    shards = tmp_path_factory.mktemp("learning") / "shards"
    precompute(
        Settings(
            pretrained_model_name_or_path=str(MODEL),
            data_config=DataConfig(img_dir=IMAGES, img_size=[SIDE], trigger_word=TRIGGER),
            preview_prompts=[prompt(PREVIEWED)],
            shards_dir=shards,
            vae_batch_size=16,
            encode_threads=1,
        )
    )
    return shards


@pytest.fixture(scope="session")
def learn(style_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Learn:
    """Train with the given settings; equal settings are trained once."""
    done: dict[str, Run] = {}

    def run(**changes: Any) -> Run:
        key = repr(sorted(changes.items()))
        if key not in done:
            path = tmp_path_factory.mktemp("run")
            values = {
                "pretrained_model_name_or_path": str(MODEL),
                "shards_dir": style_shards,
                "output_dir": path,
                "train_batch_size": 8,
                "max_train_steps": STEPS,
                "learning_rate": 1e-3,
                "lora_targets": "all-linear",
                "gradient_checkpointing": False,
                "validation_fraction": 0.25,
                "validation_steps": STEPS,
                "checkpointing_steps": STEPS,
                "logging_steps": 20,
                "preview_steps": 0,
            }
            result = train(Settings(**{**values, **changes}))
            rows = read_metrics(path / "metrics.jsonl")
            held_out = {r["step"]: r["validation_loss"] for r in rows if "validation_loss" in r}
            done[key] = Run(path, result.lora, held_out)
        return done[key]

    return run
