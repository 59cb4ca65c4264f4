# ruff: noqa: TID253
"""The transformer on the meta device: what its weights take, and its shapes when it runs."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from qwen_lora.families.qwen_image.modulation import LAYERS, TabledLinear

META = torch.device("meta")
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256  # bitsandbytes' block sizes with compress_statistics


def skeleton(
    transformer: Any, *, dtype: torch.dtype, base_precision: str, tabled: bool
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
    if base_precision in ("int8", "nf4"):
        for name, linear in list(transformer.transformer_blocks.named_modules()):
            if type(linear) is torch.nn.Linear:
                parent, _, leaf = name.rpartition(".")
                owner = transformer.transformer_blocks.get_submodule(parent)
                setattr(owner, leaf, QuantizedLinear(linear, base_precision))
    return cast(torch.nn.Module, transformer.eval().requires_grad_(False))


def stored_bytes(transformer: torch.nn.Module) -> int:
    """Of all base weights: neither LoRA nor buffers."""
    quantized = {
        module.weight: module.stored_bytes
        for module in transformer.modules()
        if isinstance(module, QuantizedLinear)
    }
    return sum(
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
    """Stands for bitsandbytes' layer: its bytes, and in a product the copies that it makes."""

    def __init__(self, linear: torch.nn.Linear, kind: str) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias, self.kind = linear.weight, linear.bias, kind
        numbers = linear.weight.numel()
        if kind == "int8":
            self.stored_bytes = numbers + 4 * linear.out_features  # a scale for each row
        else:
            blocks = -(-numbers // NF4_BLOCK)
            self.stored_bytes = numbers // 2 + blocks + 4 * -(-blocks // NF4_NESTED_BLOCK)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        apply: Any = _QuantizedProduct.apply
        product: torch.Tensor = apply(input, self.weight, self.bias, self.kind)
        return product


class _QuantizedProduct(torch.autograd.Function):
    """Nothing is kept; backward dequantises the weight, with nf4 forward too. Selective
    recomputation does not know bitsandbytes' nf4 product (here bmm); to an int8 product that of the
    outliers may be added, which it keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str
    ) -> torch.Tensor:
        ctx.weight = weight
        flat = x.flatten(0, -2)  # [tokens, in]
        if kind == "int8":
            copies = [flat.to(torch.float16), flat.to(torch.int8)]
            copies.append(flat.new_empty(len(flat), len(weight), dtype=torch.int32))
            out = F.linear(flat, weight, bias)  # [tokens, out]
        else:
            copies = [torch.empty_like(weight)]
            out = torch.bmm(flat[None], copies[0].t()[None])[0]
            out = out if bias is None else out.add_(bias)
        del copies
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return F.linear(gradient, torch.empty_like(ctx.weight).t()), None, None, None
