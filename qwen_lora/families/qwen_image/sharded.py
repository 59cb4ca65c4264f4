# ruff: noqa: TID253
"""The frozen base spread over several processes, with torch's FSDP2 (`fully_shard`).

Each process holds a part of the rows of every block's weights. A block's weights are gathered from
all of them before it runs, forward and backward, and given back after it. What is outside the
blocks (below 1 % of the model) and the LoRA, which is added later, stay whole on every process: no
gradient of FSDP's travels, optimizer and checkpoints need not know. torch prefetches the next
block's weights while one computes. Weights in 8 bits travel as the bytes they are (FSDP sends a
block whose parameters have several types as uint8), with their scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Pair = tuple[torch.Tensor, torch.Tensor]
BLOCKS = "transformer_blocks."


def shard_blocks(transformer: Any, mesh: DeviceMesh) -> None:
    """Spread the blocks' parameters, which are on the meta device, over the processes of `mesh`."""
    from torch.distributed.fsdp import fully_shard

    # The prediction and the last block's text are views; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in transformer.transformer_blocks:
        _spread_buffers(block)
        fully_shard(block, mesh=mesh)
    whole = {p for name, p in transformer.named_parameters() if not name.startswith(BLOCKS)}
    # The root has no weights of its own: it gives the blocks their common streams and order.
    fully_shard(transformer, mesh=mesh, ignored_params=whole)
    transformer.is_sharded = True


def _spread_buffers(block: torch.nn.Module) -> None:
    """FSDP spreads parameters alone: make such of the scales that come with the weights."""
    for module in block.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                delattr(module, name)
                module.register_parameter(name, torch.nn.Parameter(buffer, requires_grad=False))


def is_sharded(transformer: Any) -> bool:
    return getattr(transformer, "is_sharded", False)


def take_over_forward(transformer: Any) -> None:
    """FSDP's hooks hang on a module's call: let the call of the transformer and of each block run
    what it is given (`run_whole`, `run_in`)."""
    transformer.forward = lambda work: work()
    for block in transformer.transformer_blocks:
        block.forward = lambda image, text, work: work(image, text)


def run_whole(transformer: Any, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`work` as the forward pass of `transformer`."""
    return transformer(work) if is_sharded(transformer) else work()


def mesh_of(parameter: torch.Tensor | None) -> DeviceMesh | None:
    """The processes over which a parameter is spread; None: each has all of it."""
    return getattr(parameter, "device_mesh", None)


def own_rows(parameter: Any) -> slice:
    """The rows of a spread parameter that this process holds, as `torch.chunk` deals them out."""
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    each = -(-rows // mesh.size())
    begin = min(rows, mesh.get_local_rank() * each)
    return slice(begin, min(rows, begin + each))


def of_own_rows(rows: torch.Tensor, parameter: Any) -> torch.nn.Parameter:
    """What is to stand in the place of a spread parameter, from this process's rows of it."""
    from torch.distributed.tensor import DTensor

    value = DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return torch.nn.Parameter(value, requires_grad=False)
