# ruff: noqa: TID253
"""Captions of any lengths in one pass of Qwen2.5-VL's text model, one behind the other.

Everything but attention works on single tokens, so it needs no padding. Attention is told where
each caption begins; there alone captions are padded, on the right, where causality hides it.

B captions, T tokens of all together, L of the longest, P of the prefix, d a head's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

ATTENTION = "qwen_lora_packed"  # the name under which transformers finds `_attention`


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens with which every caption begins, [1, heads, P, d] a layer."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return self.keys[0].shape[2]


@dataclass(frozen=True)
class _Packing:
    padded: torch.Tensor  # [B, L], which of the T tokens stands there; any where it is padding
    packed: torch.Tensor  # [T], where each token stands in [B * L]
    mask: torch.Tensor  # [L, P + L] bool, what a token may look at
    prefix: Prefix | None


def use_packed_attention(module: Any) -> None:
    """Make a text model take what `forward_packed` and `make_prefix` give it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    module.set_attn_implementation(ATTENTION)


def forward_packed(
    module: Any, rows: Sequence[Sequence[int]], device: torch.device, prefix: Prefix | None = None
) -> list[torch.Tensor]:
    """Token ids of each caption, without those of `prefix` -> its final states [T_i, D]."""
    output = _run(module, rows, device, prefix)
    return list(output.last_hidden_state[0].split([len(row) for row in rows]))


def make_prefix(module: Any, ids: Sequence[int], device: torch.device) -> Prefix:
    layers = _run(module, [ids], device, None, use_cache=True).past_key_values.layers
    return Prefix(tuple(each.keys for each in layers), tuple(each.values for each in layers))


def _run(
    module: Any,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    prefix: Prefix | None,
    use_cache: bool = False,
) -> Any:
    begin = 0 if prefix is None else len(prefix)
    lengths = torch.tensor([len(row) for row in rows])  # [B]
    longest = int(lengths.max())
    columns = torch.arange(longest)
    valid = columns < lengths[:, None]  # [B, L]
    starts = lengths.cumsum(0) - lengths
    padded = torch.where(valid, starts[:, None] + columns, 0)
    mask = torch.ones(longest, begin + longest, dtype=torch.bool).tril(begin)
    positions = begin + columns.expand(len(rows), -1)[valid]  # [T]
    packing = _Packing(
        padded.to(device), valid.flatten().nonzero()[:, 0].to(device), mask.to(device), prefix
    )
    return module(
        input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
        # M-RoPE has three positions a token; a text's are equal.
        position_ids=positions.to(device).expand(3, 1, -1),
        attention_mask=dict.fromkeys(module.config.layer_types),  # `packing` has it
        use_cache=use_cache,
        packing=packing,
    )


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    packing: _Packing,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query: [1, heads, T, d]; key, value: [1, fewer heads, T, d] -> [1, T, heads, d]."""
    query, key, value = (each[0, :, packing.padded].transpose(0, 1) for each in (query, key, value))
    if packing.prefix is not None:
        key = _behind(packing.prefix.keys[module.layer_idx], key)
        value = _behind(packing.prefix.values[module.layer_idx], value)
    groups = module.num_key_value_groups
    output = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, 1),  # with a mask, few kernels share heads by themselves
        value.repeat_interleave(groups, 1),
        attn_mask=packing.mask,
        scale=scaling,
    )  # [B, heads, L, d]
    return output.transpose(1, 2).flatten(0, 1)[packing.packed][None], None


def _behind(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[1, heads, P, d], [B, heads, L, d] -> [B, heads, P + L, d]"""
    return torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=2)
