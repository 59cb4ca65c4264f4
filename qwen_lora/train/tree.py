# ruff: noqa: TID253
"""State dicts as safetensors and JSON: tensors by name, everything else as plain values.

Optimizers keep nested dicts of tensors and numbers. `pack` splits such a tree into named tensors
and a JSON tree that refers to them; `unpack` rebuilds it exactly. Anything that is neither is
refused, so nothing ever needs to be unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qwen_lora.errors import QwenLoraError

_TENSOR, _TUPLE, _FLOAT, _ITEMS = "__tensor__", "__tuple__", "__float__", "__items__"


def pack(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON form of `tree`; its tensors are added to `tensors` under names that start with
    `prefix`. Raises QwenLoraError for values that safetensors and JSON cannot hold."""
    if isinstance(tree, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory, and bitsandbytes' do.
        tensors[prefix] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: prefix}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) and not key.startswith("__") for key in tree):
            return {key: pack(value, f"{prefix}/{key}", tensors) for key, value in tree.items()}
        pairs = [[key, pack(value, f"{prefix}/{key}", tensors)] for key, value in tree.items()]
        return {_ITEMS: pairs}
    if isinstance(tree, (list, tuple)):
        items = [pack(value, f"{prefix}/{i}", tensors) for i, value in enumerate(tree)]
        return {_TUPLE: items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, (bool, int, str)):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {_FLOAT: repr(tree)}
    raise QwenLoraError(f"{prefix} holds a {type(tree).__name__}, which no checkpoint can hold")


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(unpack(value, tensors) for value in tree[_TUPLE])
    if _FLOAT in tree:
        return float(tree[_FLOAT])
    if _ITEMS in tree:
        return {key: unpack(value, tensors) for key, value in tree[_ITEMS]}
    return {key: unpack(value, tensors) for key, value in tree.items()}
