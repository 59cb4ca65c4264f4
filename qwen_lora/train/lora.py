# ruff: noqa: TID253
"""LoRA adapters through PEFT, with float32 weights on a base of any precision.

PEFT's `add_adapter` makes the layers. It would give the LoRA the base's dtype, and cast activations
up to the LoRA's: here weights are float32, initialised in float32, and cast down for the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.families.base import Family
from qwen_lora.hashing import canonical_json, sha256_hex

ADAPTER = "default"
INITS = ("gaussian", "kaiming", "orthogonal")


@dataclass(frozen=True)
class LoraSpec:
    """delta W = scaling * B A, with A [rank, in] and B [out, rank]."""

    rank: int
    alpha: float
    dropout: float
    init: str  # one of INITS; B starts at zero with each, so a new LoRA changes nothing
    use_rslora: bool
    targets: str | tuple[str, ...]

    @classmethod
    def from_settings(cls, settings: Settings) -> LoraSpec:
        targets = settings.lora_targets
        return cls(
            rank=settings.rank,
            alpha=float(settings.rank if settings.lora_alpha is None else settings.lora_alpha),
            dropout=settings.lora_dropout,
            init=settings.lora_init,
            use_rslora=settings.use_rslora,
            targets=targets if isinstance(targets, str) else tuple(targets),
        )

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def add_lora(
    transformer: torch.nn.Module, spec: LoraSpec, family: Family, seed: int
) -> list[tuple[str, torch.nn.Parameter]]:
    """Put LoRA layers into a frozen transformer; returns their parameters, the only trainable ones.

    Weights are float32 and a function of (seed, parameter name) alone: the same on every rank,
    device and processor. Raises InputError for targets that match nothing.
    """
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        init_lora_weights=True,  # overwritten below; never one that rewrites the base
        use_rslora=spec.use_rslora,
        target_modules=family.lora_target_modules(transformer, spec.targets),
    )
    transformer.requires_grad_(False)
    cast(Any, transformer).add_adapter(config, adapter_name=ADAPTER)
    parameters: list[tuple[str, torch.nn.Parameter]] = []
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            values = initial_values(name, tuple(parameter.shape), spec, seed)
            parameter.data = torch.from_numpy(values).to(parameter.device)
            parameter.requires_grad = True
            parameters.append((name, parameter))
        else:
            parameter.requires_grad_(False)
    for layer in lora_layers(transformer).values():
        layer.forward = _LoraForward(layer)
    return parameters


def initial_values(name: str, shape: tuple[int, ...], spec: LoraSpec, seed: int) -> np.ndarray:
    """float32 start of one parameter: zero for B; for A

    gaussian: standard deviation 1 / rank (PEFT); kaiming: uniform as nn.Linear's own (the LoRA
    paper, arXiv:2106.09685); orthogonal: orthonormal rows.
    """
    if ".lora_B." in name:
        return np.zeros(shape, np.float32)
    key = int(sha256_hex(canonical_json([seed, name, "lora_init"]))[:32], 16)
    random = np.random.Generator(np.random.Philox(key=key))
    if spec.init == "gaussian":
        return random.standard_normal(shape, np.float32) / np.float32(spec.rank)
    if spec.init == "kaiming":
        bound = 1.0 / np.sqrt(shape[1])
        return random.uniform(-bound, bound, shape).astype(np.float32)
    # QR of the tall side; with rank > in the columns are orthonormal instead.
    tall = random.standard_normal((max(shape), min(shape)))
    q, r = np.linalg.qr(tall)
    q = q * np.sign(np.diag(r))  # makes the decomposition unique
    return np.ascontiguousarray(q if shape[0] >= shape[1] else q.T).astype(np.float32)


class _LoraForward:
    """base(x) + scaling * B(A(dropout(x))), with A and B cast to the type of x for the product.

    In float32 these are PEFT's own operations in PEFT's order. What PEFT does besides (merged or
    disabled adapters, several adapters) is left to PEFT.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.peft_forward = type(layer).forward

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
            return self.peft_forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        result = layer.base_layer(x, *args, **kwargs)
        down = layer.lora_A[ADAPTER].weight.to(x.dtype)  # [rank, in]
        up = layer.lora_B[ADAPTER].weight.to(x.dtype)  # [out, rank]
        delta = F.linear(F.linear(layer.lora_dropout[ADAPTER](x), down), up)
        return result + (delta * layer.scaling[ADAPTER]).to(result.dtype)  # type: ignore[no-any-return]


def lora_layers(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    """Module name -> PEFT layer, in the order of the model."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer)
    }


def lora_state(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA's parameters by name, as trained (no scaling in them)."""
    return {n: p.detach() for n, p in transformer.named_parameters() if ".lora_" in n}


def load_lora_state(transformer: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put saved parameters back. Raises QwenLoraError when names or shapes are others."""
    own = lora_state(transformer)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise QwenLoraError(f"the saved LoRA has other layers than this run's: {_short(odd)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise QwenLoraError(
                f"the saved LoRA's {name} is {list(tensor.shape)}, this run's is "
                f"{list(own[name].shape)}"
            )
        own[name].copy_(tensor)


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
