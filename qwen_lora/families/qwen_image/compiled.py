# ruff: noqa: TID253
"""Blocks through torch.compile: one graph for all of them, whose weights are its inputs, with the
attention of each sample inside. Importing this loads the compiler.

What a graph keeps for its backward pass and what it computes anew there is decided by torch's
partitioner under a memory budget: a share between 0 (the block's inputs alone) and 1 (all but cheap
element-wise work). Recomputed is only what the backward pass needs: not, as when a whole block is
run again, the last product of each MLP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import _dynamo
from torch._functorch import config, partitioners
from torch._functorch.aot_autograd import aot_module
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental import _config as symbols

from qwen_lora.cache_folder import cache_folder
from qwen_lora.errors import QwenLoraError
from qwen_lora.families.qwen_image.blocks import Lengths, Pair, Rotations, run_block


class CompiledBlock:
    """`run_block`, compiled."""

    def __init__(self, budget: float) -> None:
        # One graph serves all buckets and captions, whose token counts are symbols in it. What
        # makes another one is listed here: the last block and all others; gradients or none; the
        # number of samples of a batch of different caption lengths, and one, two or more of equal.
        _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
        # Else counts that are equal by chance would be one symbol, and other counts another graph.
        symbols.use_duck_shape = False
        # Not in the system's temporary folder: the next run finds what this one has compiled. Torch
        # has named that folder itself as soon as its compiler was imported.
        if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("compiled"))
        self._run = torch.compile(_run, backend=partial(_compile, budget))

    def __call__(
        self,
        block: Any,
        image: torch.Tensor,
        text: torch.Tensor,
        image_rows: torch.Tensor,
        text_rows: torch.Tensor,
        rotations: Rotations,
        owner: torch.Tensor | None,
        lengths: Lengths,
        last: bool,
    ) -> Pair:
        _vary(1, image, text)  # numbers of tokens
        _vary(0, *rotations.image, *rotations.text)
        counts = None
        if owner is not None and lengths is not None:
            counts = [text.new_empty(length, 0) for length in lengths]
            _vary(0, owner, *counts)
        found: Pair = self._run(
            block, image, text, image_rows, text_rows, rotations, owner, counts, last
        )
        return found


def _vary(dimension: int, *tensors: Any) -> None:
    """A size that becomes a symbol of the graph."""
    for tensor in tensors:
        _dynamo.maybe_mark_dynamic(tensor, dimension)


def _run(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    image_rows: torch.Tensor,
    text_rows: torch.Tensor,
    rotations: Rotations,
    owner: torch.Tensor | None,
    counts: Sequence[torch.Tensor] | None,
    last: bool,
) -> Pair:
    """counts: of each sample's text tokens, as the size of an empty tensor. Plain numbers would be
    constants of the graph."""
    lengths = None if counts is None else tuple(count.shape[0] for count in counts)
    return run_block(block, image, text, image_rows, text_rows, rotations, owner, lengths, last)


def _compile(
    budget: float, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> Callable[..., Any]:
    with _budget(budget):
        try:
            return cast(Callable[..., Any], compile_fx(graph, list(inputs)))
        except Exception as error:  # whatever is missing in the machine's compilers
            reason = " ".join(str(error).split())[:300]
            raise QwenLoraError(
                f"torch's compiler failed ({reason}); set compile_blocks: false"
            ) from error


# ---- what a graph keeps --------------------------------------------------------------------------

# What torch 2.13 does not count among what takes long, and would compute anew under any budget: on
# an H200 cuDNN's attention is an eighth of a block's forward and backward pass.
_LONG = (torch.ops.aten._scaled_dot_product_cudnn_attention, torch.ops.aten._int_mm)


@contextmanager
def _budget(share: float) -> Iterator[None]:
    """For the partitioner, of whose memory attention is what saves the most time a byte."""
    torchs = partitioners.get_default_op_list

    def with_more() -> Any:
        found = torchs()
        return replace(found, compute_intensive_ops=found.compute_intensive_ops | {*_LONG})

    partitioners.get_default_op_list = with_more
    try:
        with config.patch(activation_memory_budget=share):
            yield
    finally:
        partitioners.get_default_op_list = torchs


class _Alone(torch.nn.Module):
    """One block with its tensors as inputs, as ahead-of-time tracing wants it."""

    def __init__(self, block: torch.nn.Module, lengths: Lengths) -> None:
        super().__init__()
        self.block, self.lengths = block, lengths

    def forward(self, image: torch.Tensor, text: torch.Tensor, *others: torch.Tensor) -> Pair:
        image_rows, text_rows, *parts, owner = others
        rotations = Rotations((parts[0], parts[1]), (parts[2], parts[3]))
        mixed = (None if self.lengths is None else owner, self.lengths)
        return run_block(
            self.block, image, text, image_rows, text_rows, rotations, *mixed, last=False
        )


def kept_bytes(transformer: Any, tokens: int, text_tokens: Sequence[int], budget: float) -> int:
    """What one block in the middle keeps for its backward pass besides its inputs, by torch's own
    partitioner. transformer: with its LoRA, on the meta device; text_tokens: of each sample.
    Nothing is compiled."""
    found = 0

    def split(joint: Any, inputs: Any, *, num_fwd_outputs: int, **others: Any) -> Any:
        nonlocal found
        with _budget(budget):
            parts = min_cut_rematerialization_partition(
                joint, inputs, num_fwd_outputs=num_fwd_outputs, **others
            )
        outputs = cast(Sequence[Any], parts[0].graph.output_node().args[0])
        kept = outputs[num_fwd_outputs:]
        sources = {_source(node) for node in kept}
        found = sum(_bytes(node) for node in sources if node.op != "placeholder")
        return parts

    batch, equal = len(text_tokens), len(set(text_tokens)) == 1
    texts, joined = (batch, text_tokens[0]) if equal else (1, sum(text_tokens))
    traced = aot_module(
        _Alone(transformer.transformer_blocks[1], None if equal else tuple(text_tokens)),
        fw_compiler=_uncompiled,
        bw_compiler=_uncompiled,
        partition_fn=split,
        decompositions=select_decomp_table(),
    )
    width, head = transformer.inner_dim, transformer.config.attention_head_dim
    dtype = transformer.img_in.weight.dtype

    def empty(*shape: int, of: torch.dtype = dtype, needs_grad: bool = False) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=of, requires_grad=needs_grad)

    traced(
        empty(batch, tokens, width, needs_grad=True),
        empty(texts, joined, width, needs_grad=True),
        *(empty(batch, 6 * width) for _ in range(2)),
        *(empty(tokens, 1, head // 2, of=torch.float32) for _ in range(2)),
        *(empty(joined, 1, head // 2, of=torch.float32) for _ in range(2)),
        empty(joined, of=torch.int64),
    )
    return found


def _uncompiled(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
    return graph


_VIEWS = ("permute", "view", "alias", "unsqueeze", "squeeze", "slice", "transpose", "expand", "t")


def _source(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose memory this one looks at."""
    while isinstance(node.target, torch._ops.OpOverload) and (
        node.target._opname in _VIEWS or node.target._opname.startswith("_unsafe_view")
    ):
        node = cast(torch.fx.Node, node.args[0])
    return node


def _bytes(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
