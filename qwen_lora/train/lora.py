# ruff: noqa: TID253
"""LoRA adapters through PEFT, with float32 weights on a base of any precision.

PEFT's `add_adapter` makes the layers, and its forward runs. By itself it would give the LoRA the
base's dtype; with float32 weights it would cast activations up to them. Here weights are float32,
initialised in float32, and cast down to the activations' type for the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.families.base import Family
from qwen_lora.families.modules import ADAPTER
from qwen_lora.hashing import hash_json

INITS = ("gaussian", "kaiming", "orthogonal")


@dataclass(frozen=True)
class LoraSpec:
    """delta W = scaling * B A, with A [rank, in] and B [out, rank]."""

    rank: int
    alpha: float
    dropout: float
    init: str  # one of INITS; B A is exactly zero with each, so a new LoRA changes nothing
    use_rslora: bool
    targets: str | tuple[str, ...]

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise InputError(
                f"lora_init {self.init!r} is not offered: {', '.join(INITS)} are. Inits that "
                "rewrite the base (pissa, olora, corda, loftq, ...) need that base to load the LoRA"
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise InputError(f"lora_init orthogonal needs an even rank, not {self.rank}")

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
    for name, layer in lora_layers(transformer).items():
        device = layer.lora_A[ADAPTER].weight.device
        for kind, part in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            shape = tuple(part[ADAPTER].weight.shape)
            values = initial_values(f"{name}.{kind}", shape, spec, seed)
            part[ADAPTER] = _CastLinear(torch.from_numpy(values).to(device))
        layer.cast_input_dtype_enabled = False  # activations keep their type
    return [(n, p) for n, p in transformer.named_parameters() if ".lora_" in n]


class _CastLinear(torch.nn.Linear):
    """A Linear without bias whose float32 weight is cast to its input's type for the product; the
    gradient comes back to the weight in float32. In float32 it is PEFT's own nn.Linear."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = torch.nn.Parameter(weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def initial_values(
    name: str, shape: tuple[int, ...], spec: LoraSpec, seed: int
) -> NDArray[np.float32]:
    """float32 start of A [rank, in] or B [out, rank], whose name ends in lora_A or lora_B.

    gaussian: A normal with standard deviation 1 / rank (PEFT), B zero; kaiming: A uniform as
    nn.Linear's own weights (the LoRA paper, arXiv:2106.09685), B zero; orthogonal: PEFT's, A and B
    normal with standard deviation 1/10 in complementary halves of the rank's dimensions. PEFT turns
    those halves by a random rotation, after which the product is zero only up to rounding; without
    it B A is exactly zero in every dtype.
    """
    key = int(hash_json([seed, "lora_init", name])[:32], 16)
    random = np.random.Generator(np.random.Philox(key=key))
    is_down = name.endswith("lora_A")
    if spec.init == "orthogonal":
        values = random.standard_normal(shape, np.float32) / np.float32(10)
        rows = values if is_down else values.T  # [rank, in or out], a view
        rows[1 if is_down else 0 :: 2] = 0
        return values
    if not is_down:
        return np.zeros(shape, np.float32)
    if spec.init == "gaussian":
        return random.standard_normal(shape, np.float32) / np.float32(spec.rank)
    bound = 1.0 / np.sqrt(shape[1])
    return random.uniform(-bound, bound, shape).astype(np.float32)


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
