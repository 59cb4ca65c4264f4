"""A tiny transformer with a LoRA, and one fixed batch for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.tiny_model.build import TEXT_WIDTH
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.transformer import load_base

CPU = torch.device("cpu")


@dataclass
class LoraModel:
    model: ModelFolder
    transformer: Any
    spec: LoraSpec
    parameters: list[tuple[str, torch.nn.Parameter]]

    def predict(self) -> torch.Tensor:
        """[B, C, h, w] float32, of a batch with prompts of two lengths."""
        return predict(self.model, self.transformer)


def predict(model: ModelFolder, transformer: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    return model.family.velocity(
        transformer,
        torch.randn(2, 16, 4, 6, generator=random),
        torch.tensor([0.25, 0.75]),
        [torch.randn(length, TEXT_WIDTH, generator=random) for length in (3, 5)],
        [torch.ones(length, dtype=torch.bool) for length in (3, 5)],
    )


def lora_model(
    folder: Path, *, seed: int = 0, table: Path | None = None, **changes: Any
) -> LoraModel:
    """The model with a LoRA; other keywords are settings."""
    settings = Settings(**{"rank": 4, "gradient_checkpointing": False, **changes})
    model = resolve_model(str(folder), ("transformer", "scheduler"))
    transformer = load_base(model, settings, CPU, table)
    spec = LoraSpec.from_settings(settings)
    return LoraModel(model, transformer, spec, add_lora(transformer, spec, model.family, seed))


def shake(made: LoraModel, seed: int = 1, size: float = 0.1) -> None:
    """Stands for training: every LoRA weight becomes a random number."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in made.parameters:
            parameter.copy_(size * torch.randn(parameter.shape, generator=random))
