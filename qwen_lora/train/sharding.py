# ruff: noqa: TID253
"""Over which processes the frozen base is spread (`shard_base`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FSDP = "fsdp"  # by this name PEFT knows that a layer computes with its whole weight


def shards_of_base(settings: Settings, world: int) -> int:
    """Into how many parts the blocks' weights are cut."""
    if settings.shard_base == "none":
        return 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return here if settings.shard_base == "node" else world


def base_mesh(ranks: Ranks, settings: Settings) -> DeviceMesh | None:
    """The processes that hold one copy of the base together with this one; None: it has its own.
    All processes call it. Raises InputError when machines have different numbers of them."""
    if settings.shard_base == "none" or ranks.world == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if settings.shard_base == "all":
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=(FSDP,))
    places = ranks.gather_json(ranks.local_rank)
    each = max(places) + 1
    if ranks.world % each or places != [rank % each for rank in range(ranks.world)]:
        raise InputError(
            "shard_base: node needs the same number of processes on every machine, numbered "
            f"machine by machine; their places are {places}. Use shard_base: all"
        )
    if each == 1:
        raise InputError(
            "shard_base: node spreads the base over the processes of one machine, and each has "
            "only one here; use shard_base: all"
        )
    shape = (ranks.world // each, each)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("nodes", FSDP))[FSDP]
