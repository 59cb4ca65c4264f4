# ruff: noqa: TID253
"""The LoRA file: names as diffusers gives them, scale folded in, provenance in the header.

Readers that know the metadata apply alpha / rank, others assume 1: with the trained scaling folded
into B and alpha = rank in the metadata both compute the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.families.modules import ADAPTER
from qwen_lora.hashing import canonical_json
from qwen_lora.posix import write_atomic
from qwen_lora.train.lora import LoraSpec, lora_layers

DIFFUSERS_KEY = "lora_adapter_metadata"  # where diffusers' write_lora_layers puts the config
OWN_KEY = "qwen_lora"


def save_lora(
    path: Path,
    transformer: torch.nn.Module,
    spec: LoraSpec,
    dtype: str = "float32",
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write `transformer.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank].

    dtype: float32, bfloat16 or float16. provenance: JSON values that stand under `qwen_lora` in the
    header, beside the trained rank and alpha. The file is whole or absent, its bytes reproducible.
    Raises QwenLoraError, and writes nothing, when a number is not finite in `dtype`.
    """
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(transformer).items():
        down = layer.lora_A[ADAPTER].weight.detach().float().cpu()
        up = layer.lora_B[ADAPTER].weight.detach().float().cpu() * layer.scaling[ADAPTER]
        tensors[f"transformer.{name}.lora_A.weight"] = down.to(stored).contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = up.to(stored).contiguous()
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise QwenLoraError(
            f"{bad[0]} of the LoRA is not finite in {dtype}; nothing was written"
            + ("" if dtype == "float32" else ", save_dtype: float32 may hold it")
        )
    # Only what a reader needs: PEFT refuses keys that its version does not know, and diffusers
    # leaves a dropout that stands here switched on.
    config = {
        "r": spec.rank,
        "lora_alpha": spec.rank,
        "use_rslora": False,
        "target_modules": sorted(lora_layers(transformer)),
    }
    own = {
        "rank": spec.rank,
        "alpha": spec.alpha,
        "use_rslora": spec.use_rslora,
        **(provenance or {}),
    }
    metadata = {
        "format": "pt",
        DIFFUSERS_KEY: canonical_json({f"transformer.{k}": v for k, v in config.items()}).decode(),
        OWN_KEY: canonical_json(own).decode(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical_header(save(tensors, metadata)))


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A LoRA file's tensors and its `qwen_lora` facts ({} in a file of another trainer).

    Raises InputError when there is no such file or it is not a safetensors file.
    """
    try:
        data = path.read_bytes()
        tensors: dict[str, torch.Tensor] = load(data)
        metadata = _header(data).get("__metadata__", {})
        facts = json.loads(metadata.get(OWN_KEY, "{}"))
    except OSError as error:
        raise InputError(f"no LoRA file at {path}: {error.strerror}") from None
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a LoRA file: {error}") from None
    return tensors, facts


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def canonical_header(data: bytes) -> bytes:
    """A safetensors file with its header's keys sorted: the library orders metadata at random."""
    length = int.from_bytes(data[:8], "little")
    header = canonical_json(_header(data))
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
