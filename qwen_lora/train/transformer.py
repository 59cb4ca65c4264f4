# ruff: noqa: TID253
"""The frozen transformer of a run: checked against the shards before it is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_lora.cache_folder import cache_folder
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.hashing import hash_json
from qwen_lora.models import ModelFolder
from qwen_lora.posix import make_folder, publish_file, temporary_file
from qwen_lora.shards.format import Manifest

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TABLE_FORMAT = 1  # of the modulation table
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_transformer(model: ModelFolder, manifests: Sequence[Manifest]) -> None:
    """Raises InputError when the shards are for another family, latent or text width.

    Only configs are read. Another model id is fine: Qwen-Image-2512 trains on Qwen-Image's shards.
    """
    config = model.config("transformer")
    found = config.get("_class_name", model.family.transformer_class)
    if found != model.family.transformer_class:
        raise InputError(
            f"the transformer of {model.model_id} is a {found}; {model.family.name} has a "
            f"{model.family.transformer_class}"
        )
    facts = model.family.transformer_facts(config)
    for manifest in manifests:
        pairs = {
            "family": (manifest.fingerprint.family, model.family.name),
            "latent channels": (manifest.latent_channels, facts["latent_channels"]),
            "text width": (manifest.text_width, facts["text_width"]),
        }
        for name, (of_shards, of_model) in pairs.items():
            if of_shards != of_model:
                raise InputError(
                    f"the shards do not fit the model {model.model_id}: {name} {of_shards} in the "
                    f"shards, {of_model} in the transformer; name the model the shards were made "
                    "for, or run precompute with this one"
                )


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """What the transformer computes in; auto is bfloat16 on a GPU that has it, else float32."""
    if settings.mixed_precision != "auto":
        return DTYPES[settings.mixed_precision]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def load_base(
    model: ModelFolder,
    settings: Settings,
    device: torch.device,
    table: Path | None = None,
    mesh: DeviceMesh | None = None,
    blocks_on_device: int | None = None,
) -> torch.nn.Module:
    """The frozen transformer on `device`, in the compute type or quantised, in eval mode. table:
    what `modulation_table` returned; mesh: what `base_mesh` returned; blocks_on_device: as in
    `Family.load_transformer`.

    Nothing else of the model is opened. Raises InputError for files that do not fit the config.
    """
    dtype = choose_dtype(settings, device)
    if dtype is torch.float16 and _is_main_process():
        print(
            "warning: Qwen-Image's activations overflow float16; use mixed_precision bf16 on a "
            "card that has it",
            file=sys.stderr,
        )
    return model.family.load_transformer(
        model,
        device=device,
        dtype=dtype,
        base_precision=settings.base_precision,
        low_precision_products=settings.low_precision_products,
        modulation_table=table,
        blocks_on_device=blocks_on_device,
        mesh=mesh,
    )


def forward_options(
    settings: Settings, recompute: Recompute, blocks_on_device: int | None = None, stay: int = 0
) -> ForwardOptions:
    """How the transformer is to run; the others: what `train.cost.choice` made of the settings."""
    return ForwardOptions(
        own=settings.own_forward,
        recompute=recompute,
        compiled=settings.compile_blocks is True,
        blocks_on_device=blocks_on_device,
        offload_activations=settings.offload_activations,
        activations_on_device=stay,
    )


def uses_table(settings: Settings, dtype: torch.dtype) -> bool:
    """Whether a table stands for the modulation layers."""
    return settings.modulation_table and settings.own_forward and dtype == torch.bfloat16


def modulation_table(
    model: ModelFolder, settings: Settings, device: torch.device, base_fingerprint: str
) -> Path | None:
    """The table of this base model, made if this machine has none yet; None where none is used.

    Runs and processes share it; call it on one process first. Raises QwenLoraError when it cannot
    be written.
    """
    dtype = choose_dtype(settings, device)
    if not uses_table(settings, dtype):
        return None
    key = hash_json([TABLE_FORMAT, base_fingerprint, str(dtype), device.type, torch.__version__])
    folder = cache_folder("modulation")
    path = folder / f"{key[:16]}.safetensors"
    if path.exists():
        return path
    try:
        make_folder(folder)
        with temporary_file(folder, path.name) as (file, temporary):
            model.family.make_modulation_table(model, temporary, device=device, dtype=dtype)
            os.fsync(file.fileno())
            publish_file(temporary, path)
    except OSError as error:
        raise QwenLoraError(
            f"cannot write the modulation table {path}: {error.strerror or error}; free some "
            "space, name another folder in QWEN_LORA_CACHE, or set modulation_table: false"
        ) from error
    return path


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
