"""From trained parts to a `QwenImagePipeline` folder of float16 safetensors, and a shard set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.tiny_model.build import SCHEDULER_CONFIG
from tools.emoji_model.text import TRIGGER


def write_pipeline(
    folder: Path, *, vae: Any, tokenizer: Any, text_encoder: Any, transformer: Any
) -> None:
    """Replaces `folder`; the parts become float16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(str(folder))


def shard_settings(model: Path, images: Path, shards: Path, side: int) -> Settings:
    """How the emoji become shards: `emoji, <name>`, on white."""
    return Settings(
        pretrained_model_name_or_path=str(model),
        data_config=DataConfig(img_dir=images, img_size=[side], trigger_word=TRIGGER),
        shards_dir=shards,
        vae_batch_size=32,
        text_batch_size=64,
        text_encoder_dtype="float32",
        encode_threads=2,
    )
