"""Qwen-Image's transformer with random weights, made on the device one tensor at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwen_lora.families.qwen_image.loading import (
    empty_module,
    made_from_weight,
    place,
    quantize_linears,
)
from qwen_lora.families.qwen_image.modulation import LAYERS, TabledLinear
from qwen_lora.families.qwen_image.scaled import KINDS, scale_linears
from qwen_lora.families.qwen_image.sharded import shard_blocks
from qwen_lora.families.streaming import BlockStreamer, spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HEAD = 128
BASES = ("bf16", *KINDS, "nf4")


def config_of(heads: int, blocks: int) -> dict[str, object]:
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": HEAD,
        "axes_dims_rope": [16, 56, 56],
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": heads,
        "num_layers": blocks,
        "out_channels": 16,
        "patch_size": 2,
    }


class RandomTable:
    """Stands for a modulation table: a few random rows on the host, one copied per sample."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype, pin: bool) -> None:
        rows = torch.randn(8, layers, 2, 6 * width).mul_(0.1).to(dtype)
        self._rows = rows.pin_memory() if pin else rows

    def look_up(self, sigmas: torch.Tensor, device: torch.device) -> torch.Tensor:
        rows = self._rows[[int(sigma * 8) % 8 for sigma in sigmas.tolist()]]
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def make_transformer(
    config: dict[str, object],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tabled: bool = True,
    base: str = "bf16",
    products: str = "none",
    on_device: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Any:
    """As the project's loader makes it, the same numbers at every call. tabled: random rows stand
    for the modulation layers; on_device: the other blocks go to host memory, one by one; mesh: of
    spread weights each device keeps its rows."""
    from diffusers import QwenImageTransformer2DModel

    known = {name: value for name, value in config.items() if not name.startswith("_")}
    model: Any = empty_module(lambda: QwenImageTransformer2DModel(**known))
    model.requires_grad_(False)
    blocks = model.transformer_blocks
    if tabled:
        on_gpu = device.type == "cuda"
        torch.manual_seed(0)
        model.modulation_table = RandomTable(len(blocks), model.inner_dim, dtype, on_gpu)
        for block in blocks:
            for name in LAYERS:
                parent = block.get_submodule(name.split(".")[0])
                parent[1] = TabledLinear(parent[1], device, dtype)
    if base in KINDS:
        scale_linears(blocks, base, products)
    elif base == "nf4":
        quantize_linears(blocks, base, dtype)
        model.is_loaded_in_4bit = True
    if mesh is not None:
        shard_blocks(model, mesh)
    if on_device is not None:
        model.streamer = BlockStreamer(device)
    streamed = spread(len(blocks), len(blocks) - on_device) if on_device is not None else []
    for index, block in enumerate(blocks):
        fill(block, device, dtype, seed=index)
        if index in streamed:
            model.streamer.store(index, block)
    fill(model, device, dtype, seed=len(blocks))
    if on_device is not None:
        model.streamer.finish()
    return model.to(device).requires_grad_(False)


def fill(
    module: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, seed: int = 0
) -> None:
    """Give numbers to every parameter that has no memory yet."""
    filled = [each for each in module.named_parameters() if not made_from_weight(module, each[0])]
    for number, (name, parameter) in enumerate(filled):
        if not parameter.is_meta:
            continue
        if parameter.ndim == 1:
            value = torch.full(parameter.shape, float(name.endswith("weight")), device=device)
        else:
            owner = module.get_submodule(name.rpartition(".")[0])
            shape = parameter.shape
            if isinstance(owner, torch.nn.Linear):  # 4-bit weights are packed
                shape = torch.Size((owner.out_features, owner.in_features))
            generator = torch.Generator(device).manual_seed(1000 * seed + number)
            value = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(0.02)
        place(module, name, value, device, dtype)
