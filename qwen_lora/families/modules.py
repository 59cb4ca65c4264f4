# ruff: noqa: TID253
"""Questions about a transformer that may be wrapped, adapted or quantised."""

from __future__ import annotations

from typing import Any

import torch

ADAPTER = "default"  # the name that PEFT's layers know our LoRA by


def unwrap(transformer: Any) -> Any:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        for name in ("_orig_mod", "module"):
            inner = getattr(transformer, name, None)
            if isinstance(inner, torch.nn.Module):
                transformer = inner
                break
        else:
            return transformer


def compute_dtype(transformer: Any) -> torch.dtype:
    """The type that a transformer computes in: that of its floating-point base weights.

    LoRA weights are float32 on a base of any type, and quantised weights are integers; neither says
    what the model computes in. A callable without base weights computes in float32.
    """
    model = unwrap(transformer)
    if isinstance(model, torch.nn.Module):
        for name, parameter in model.named_parameters():
            wide = parameter.is_floating_point() and parameter.element_size() > 1  # no fp8
            if wide and "lora_" not in name:
                return parameter.dtype
    return torch.float32
