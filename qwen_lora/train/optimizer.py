# ruff: noqa: TID253
"""Optimizers by name, or any `module.Class` with arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]
NAMES = ("adamw", "adamw8bit", "prodigy")
_FUSED_DEVICES = ("cuda", "cpu")


def make_optimizer(parameters: NamedParameters, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer over float32 LoRA parameters.

    `adam_*` settings go to AdamW and its 8-bit form; to others only those that are set and that
    they take. Raises InputError for a name, argument or missing extra that the user can put right.
    """
    weights = [parameter for _, parameter in parameters]
    kind, defaults = _find(settings, weights)
    arguments = {"lr": settings.learning_rate, **defaults, **settings.optimizer_args}
    try:
        optimizer = kind(weights, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer {settings.optimizer}: {error}; see optimizer_args") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"{settings.optimizer} is not a torch optimizer")
    return optimizer


def _find(settings: Settings, weights: Sequence[torch.nn.Parameter]) -> tuple[Any, dict[str, Any]]:
    """The class and what the settings give it besides the learning rate."""
    adam = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    name = settings.optimizer
    if name == "adamw":
        fused = all(weight.device.type in _FUSED_DEVICES for weight in weights)
        return torch.optim.AdamW, adam | {"fused": fused}
    if name == "adamw8bit":
        return _extra("bitsandbytes.optim", "AdamW8bit", name, "quant"), adam
    if name == "prodigy":
        kind = _extra("prodigyopt", "Prodigy", name, "prodigy")
    else:
        kind = _by_path(name)
    return kind, _accepted(kind, adam, settings)


def _extra(module: str, name: str, optimizer: str, extra: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise InputError(
            f"optimizer {optimizer} needs an extra: pip install 'qwen-lora[{extra}]'"
        ) from None


def _by_path(path: str) -> Any:
    """The class that `module.Class` names."""
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise InputError(
            f"unknown optimizer {path!r}; known: {', '.join(NAMES)}, or module.Class such as "
            "torch.optim.Adagrad"
        )
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"optimizer {path!r} cannot be imported: {error}") from None
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(f"{path} is not a torch optimizer class")
    return kind


def _accepted(kind: Any, adam: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The adam_* values that the user set and the class takes."""
    given = settings.model_fields_set
    wanted = {
        "betas": {"adam_beta1", "adam_beta2"} & given,
        "eps": {"adam_epsilon"} & given,
        "weight_decay": {"adam_weight_decay"} & given,
    }
    takes = inspect.signature(kind).parameters
    return {name: adam[name] for name, keys in wanted.items() if keys and name in takes}
