# ruff: noqa: TID253
"""A transformer in a single safetensors file, as ComfyUI keeps and people share them.

Names are diffusers' own, with or without `model.diffusion_model.` in front, which is what ComfyUI's
model of Qwen-Image and diffusers' `from_single_file` have too. Weights may be 8-bit:

- fp8 without scales: the numbers themselves;
- `fp8_scaled`: a key `scaled_fp8` and for each layer `.scale_weight`; `.scale_input` is for
  products of 8 bits with a fixed scale and not needed;
- the newer form: `.weight_scale`, and what it means as JSON in `.comfy_quant` beside each layer or
  in the file's metadata under `_quantization_metadata`.

(ComfyUI's QUANTIZATION.md, comfy/ops.py and `convert_old_quants` in comfy/utils.py.) Anything else
that is quantised is refused: read as plain numbers it would be a wrong weight, silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image.scaled import Stored

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
CONFIG = ".comfy_quant"
SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale")
FLOATS = {"F64", "F32", "F16", "BF16"}
EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8_tensorwise"}
# Of a layer's description: what changes nothing in what its numbers mean.
HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "per_channel", "per_row"}


@dataclass(frozen=True)
class Weight:
    """The key under which a file has a weight, and what makes it of that tensor."""

    key: str
    make: Callable[[torch.Tensor], torch.Tensor | Stored]


def weights_of(path: Path, file: Any) -> dict[str, Weight]:
    """diffusers' name of each weight, and what it is made of. file: an open safetensors file.

    Raises InputError, before a weight is read, for one whose numbers are not understood.
    """
    keys = _without_prefix(file.keys())
    configs = _configs(path, file, keys)
    scales = {
        name.removesuffix(ending): key
        for name, key in keys.items()
        for ending in SCALES
        if name.endswith(ending)
    }
    is_scaled = bool(scales or configs or MARKER in keys)
    found: dict[str, Weight] = {}
    for name, key in keys.items():
        if name == MARKER or name.endswith((*SCALES, *UNUSED, CONFIG)):
            continue
        layer = name.removesuffix(".weight") if name.endswith(".weight") else None
        scale, config = scales.pop(layer or "", None), configs.pop(layer or "", None)
        kind = file.get_slice(key).get_dtype()
        problem = _problem(kind, config, scale is not None, is_scaled and layer is not None)
        if problem:
            raise InputError(
                f"{path}: {name} {problem}; take the model's bfloat16 file, or one in fp8 or "
                "ComfyUI's fp8_scaled"
            )
        if scale is None:
            found[name] = Weight(key, _plain)
        else:
            found[name] = Weight(key, partial(_scaled, path, file, key, scale))
    if left := sorted({*scales, *configs}):
        raise InputError(f"{path} has a scale for {left[0]}, which has no weight in it")
    if not found:
        raise InputError(f"{path} holds no weight of a transformer")
    return found


def _without_prefix(keys: list[str]) -> dict[str, str]:
    """Name -> key. Where names have a prefix, what has none belongs to other models."""
    for prefix in PREFIXES:
        named = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
        if named:
            return named
    return {key: key for key in keys}


def _configs(path: Path, file: Any, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Layer -> what the file says of how it is quantised."""
    found: dict[str, Any] = {}
    try:
        if METADATA in (metadata := file.metadata() or {}):
            layers = dict(json.loads(metadata[METADATA])["layers"])
            found = {name: layers[key] for key, name in _named(layers).items()}
        for name, key in keys.items():
            if name.endswith(CONFIG):
                found[name.removesuffix(CONFIG)] = json.loads(
                    file.get_tensor(key).numpy().tobytes()
                )
        described = {
            name: {"format": value} if isinstance(value, str) else dict(value)
            for name, value in found.items()
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: its description of quantised layers cannot be read "
            f"({type(error).__name__}); take the model's bfloat16 file"
        ) from None
    return described


def _named(layers: Mapping[str, Any]) -> dict[str, str]:
    """Key -> layer, with and without a prefix: both are written."""
    names = {}
    for key in layers:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        names[key] = key.removeprefix(prefix)
    return names


def _problem(
    kind: str, config: Mapping[str, Any] | None, has_scale: bool, wants_scale: bool
) -> str | None:
    """What is not understood of a weight of this type; None: all is."""
    named = None if config is None else config.get("format")
    if kind in FLOATS:
        if config is None and not has_scale:
            return None
        return f"is {kind} and yet has a scale" if config is None else f"is {kind}, not {named}"
    if kind not in EIGHT_BITS:
        return f"is {kind}" + (f" ({named})" if named else "") + ", which is not understood"
    if config is not None:
        if named != EIGHT_BITS[kind]:
            return f"is {kind}, quantised as {named}, which is not understood"
        odd = [str(key) for key, value in config.items() if value and key not in HARMLESS]
        if odd:
            return f"is quantised as {named} with {', '.join(sorted(odd))}, which is not understood"
    elif kind == "I8":
        return "is int8, and the file does not say how"
    if not has_scale and (wants_scale or kind == "I8"):
        return f"is {kind} and has no scale"
    return None


def _plain(tensor: torch.Tensor) -> torch.Tensor | Stored:
    if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2:
        return Stored(tensor, torch.ones(len(tensor)))
    return tensor.float() if tensor.element_size() == 1 else tensor


def _scaled(path: Path, file: Any, key: str, scale_key: str, values: torch.Tensor) -> Stored:
    scale = file.get_tensor(scale_key).float()
    outs = values.shape[0]
    if scale.numel() == 1:
        scale = scale.reshape(1).expand(outs).contiguous()
    elif scale.shape in ((outs,), (outs, 1)):
        scale = scale.reshape(outs)
    else:
        raise InputError(
            f"{path}: {key} has a scale of shape {list(scale.shape)}; one for the whole weight or "
            f"one for each of its {outs} rows is understood"
        )
    return Stored(values, scale)
