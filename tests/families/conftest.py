"""The tiny model as the family sees it, and diffusers' pipeline of it as the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.models import ModelFolder, resolve_model


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> ModelFolder:
    components = ["vae", "text_encoder", "tokenizer", "transformer", "scheduler"]
    return resolve_model(str(tiny_model), components)


@pytest.fixture(scope="session")
def pipeline(tiny_model: Path) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(str(tiny_model))


@pytest.fixture(scope="session")
def transformer(model: ModelFolder) -> torch.nn.Module:
    """Float32; tests must not change it."""
    return model.family.load_transformer(model, device=torch.device("cpu"), dtype=torch.float32)
