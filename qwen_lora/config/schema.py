"""Every setting, with its default, in one schema for both commands.

`Settings` is frozen; YAML, `--set` and options are merged in `qwen_lora.config.load`. The fields
stand in data.py (data_config), stage1.py (precompute) and stage2.py (train).
"""

from __future__ import annotations

from pathlib import Path

from qwen_lora.config.data import DataConfig
from qwen_lora.config.field import LocalPath, Section, SetPlace, setting
from qwen_lora.config.stage1 import PrecomputeSettings
from qwen_lora.config.stage2 import ShardSource, TrainSettings

__all__ = ["DataConfig", "Section", "Settings", "ShardSource"]


class CommonSettings(Section):
    """What both commands read."""

    # -- both ----------------------------------------------------------------------------------
    pretrained_model_name_or_path: str | None = setting(
        None,
        "Hugging Face id (id@revision) or folder in diffusers layout; empty: Qwen/Qwen-Image, "
        "for train the model that the shards record.",
        command="both",
        changes="result",
    )
    data_config: DataConfig = setting(
        DataConfig(), "Images and captions.", command="both", changes="shards"
    )
    shards_dir: SetPlace = setting(
        Path("shards"),
        "Where the shard set is: a folder or a URL.",
        command="both",
        changes="nothing",
    )
    shard_cache_dir: LocalPath | None = setting(
        None,
        "Where downloads of remote shard sets are kept; empty: ~/.cache/qwen-lora/shards.",
        command="both",
        changes="nothing",
    )
    shard_cache_gib: float = setting(
        100.0, "Most GiB of downloads kept.", command="both", changes="nothing", gt=0
    )
    num_processes: int = setting(
        1,
        "Devices; the command starts that many processes.",
        command="both",
        changes="nothing",
        ge=1,
    )
    seed: int = setting(
        0, "Seed of every random choice.", command="both", changes="result", ge=0, lt=2**63
    )


class Settings(TrainSettings, PrecomputeSettings, CommonSettings):
    """All settings of both commands."""
