"""The tiny model is a whole pipeline that plain diffusers loads and runs."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from qwen_lora.errors import InputError
from qwen_lora.tiny_model import write_tiny_model
from qwen_lora.tiny_model.images import synthetic_images

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


def test_plain_diffusers_loads_and_runs_it(tiny_model: Path) -> None:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model))
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompt=prompt,
            negative_prompt=" ",
            true_cfg_scale=4.0,
            height=64,
            width=96,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for prompt in ("a red owl", "a blue bicycle")
    ]
    assert images[0].shape == (1, 3, 64, 96)
    assert images[0].isfinite().all() and images[0].std() > 0.01
    assert not torch.equal(images[0], images[1])  # the prompt matters
