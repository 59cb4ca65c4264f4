# ruff: noqa: TID253
"""The transformer on the meta device: what its weights take, and its shapes when it runs."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from qwen_lora.families.qwen_image.modulation import LAYERS, TabledLinear
from qwen_lora.families.qwen_image.scaled import KINDS, ScaledLinear, scale_linears

META = torch.device("meta")
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes with compress_statistics


def skeleton(
    transformer: Any,
    *,
    dtype: torch.dtype,
    base_precision: str,
    low_precision_products: str = "none",
    tabled: bool,
) -> torch.nn.Module:
    """Make what `load_transformer` would make of a transformer whose parameters are on the meta
    device, without reading anything."""
    torch.nn.Module.to(transformer, META, dtype)  # diffusers' own warns of types it would keep
    if tabled:
        for block in transformer.transformer_blocks:
            for name in LAYERS:
                parent, _, leaf = name.rpartition(".")
                owner = block.get_submodule(parent)
                setattr(owner, leaf, TabledLinear(owner.get_submodule(leaf), META, dtype))
        transformer.modulation_table = _EmptyTable(transformer, dtype)
    if base_precision in KINDS:
        scale_linears(transformer.transformer_blocks, base_precision, low_precision_products)
    elif base_precision == "nf4":
        for name, linear in list(transformer.transformer_blocks.named_modules()):
            if type(linear) is torch.nn.Linear:
                parent, _, leaf = name.rpartition(".")
                owner = transformer.transformer_blocks.get_submodule(parent)
                setattr(owner, leaf, QuantizedLinear(linear))
    return cast(torch.nn.Module, transformer.eval().requires_grad_(False))


def stored_bytes(transformer: torch.nn.Module) -> int:
    """Of all base weights with their scales: neither LoRA nor other buffers."""
    quantized = {
        module.weight: module.stored_bytes
        for module in transformer.modules()
        if isinstance(module, QuantizedLinear)
    }
    scales = sum(
        buffer.numel() * buffer.element_size()
        for module in transformer.modules()
        if isinstance(module, ScaledLinear)
        for buffer in module.buffers(recurse=False)
    )
    return scales + sum(
        quantized.get(parameter, parameter.numel() * parameter.element_size())
        for name, parameter in transformer.named_parameters()
        if ".lora_" not in name
    )


class _EmptyTable:
    """Has rows for every noise level, without numbers."""

    def __init__(self, transformer: Any, dtype: torch.dtype) -> None:
        self._shape = (len(transformer.transformer_blocks), 2, 6 * transformer.inner_dim)
        self._dtype = dtype

    def look_up(self, sigmas: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty(len(sigmas), *self._shape, device=device, dtype=self._dtype)


class QuantizedLinear(torch.nn.Linear):
    """Stands for bitsandbytes' nf4 layer: its bytes, and in a product the copy that it makes."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        numbers = linear.weight.numel()
        blocks = -(-numbers // NF4_BLOCK)
        self.stored_bytes = numbers // 2 + blocks + 4 * -(-blocks // NF4_NESTED_BLOCK)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        apply: Any = _QuantizedProduct.apply
        product: torch.Tensor = apply(input, self.weight, self.bias)
        return product


class _QuantizedProduct(torch.autograd.Function):
    """Nothing is kept; forward and backward dequantise the weight. Selective recomputation does not
    know bitsandbytes' product (here bmm)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        flat = x.flatten(0, -2)  # [tokens, in]
        dense = torch.empty_like(weight)
        out = torch.bmm(flat[None], dense.t()[None])[0]
        del dense
        out = out if bias is None else out.add_(bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return F.linear(gradient, torch.empty_like(ctx.weight).t()), None, None
