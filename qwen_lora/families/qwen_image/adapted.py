# ruff: noqa: TID253
"""Linear layers with PEFT's LoRA on them, computed together when they share their input.

PEFT's layers stay what they are: they hold the weights and name them. Their forward costs seven
operators a layer; here q, k and v share one thin product with all their A, and the base's product
adds to the LoRA's (on an fp8 or int8 base the LoRA's to the base's). With LoRA dropout, or on nf4,
PEFT's own forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from qwen_lora.families.lora_cast import cast_weight
from qwen_lora.families.modules import ADAPTER
from qwen_lora.families.qwen_image.scaled import ScaledLinear, shared_rows


def project(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """What each of `layers` (Linears, with or without LoRA) makes of x [., ., in]."""
    adapted = [layer for layer in layers if _is_plain_lora(layer)]
    flat = x.flatten(0, -2)  # [tokens, in]
    bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
    rows = shared_rows(bases, flat)

    def alone(layer: Any) -> torch.Tensor:
        out: torch.Tensor = layer(x, rows) if type(layer) is ScaledLinear else layer(x)
        return out

    if not adapted:
        return [alone(layer) for layer in layers]
    downs = [cast_weight(layer.lora_A[ADAPTER], x.dtype) for layer in adapted]  # [r, in] each
    small = F.linear(flat, downs[0] if len(downs) == 1 else torch.cat(downs))  # [tokens, sum of r]
    parts = iter(torch.split(small, [down.shape[0] for down in downs], dim=1))
    outputs = []
    for layer in layers:
        if not _is_plain_lora(layer):
            outputs.append(alone(layer))
            continue
        base, up = layer.base_layer, cast_weight(layer.lora_B[ADAPTER], x.dtype)
        scaling = layer.scaling[ADAPTER]
        if torch.compiler.is_compiling():
            # The sum goes into the kernel that reads it; an addmm would copy its first argument.
            delta = F.linear(next(parts), up) * scaling
            outputs.append(torch.unflatten(base(flat) + delta, 0, x.shape[:-1]))
            continue
        if type(base) is ScaledLinear:
            out = torch.addmm(base(flat, rows), next(parts), up.t(), alpha=scaling)  # [tokens, out]
            outputs.append(torch.unflatten(out, 0, x.shape[:-1]))
            continue
        if base.bias is None:
            delta = F.linear(next(parts), up) * scaling
        else:
            delta = torch.addmm(base.bias, next(parts), up.t(), alpha=scaling)
        out = torch.addmm(delta, flat, base.weight.t())  # [tokens, out]
        outputs.append(torch.unflatten(out, 0, x.shape[:-1]))
    return outputs


def _is_plain_lora(layer: Any) -> bool:
    """A LoRA without dropout on a Linear that is not bitsandbytes', switched on and not merged."""
    if not isinstance(layer, LoraLayer):
        return False
    dropout = layer.lora_dropout[ADAPTER]
    return (
        type(layer.get_base_layer()) in (torch.nn.Linear, ScaledLinear)
        and not layer.merged
        and not layer.disable_adapters
        # Asked last: torch.compile makes a graph for either answer.
        and not (isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and layer.training)
    )
