# ruff: noqa: TID253
"""The transformer's forward pass for training, on the modules of diffusers' own model.

Same numbers as `QwenImageTransformer2DModel.forward` on text-to-image inputs, with three
differences: modulation may come from a table (modulation.py), the last block leaves out what only
its text output needs, and prompts of different lengths are neither padded nor masked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qwen_lora.cache_folder import cache_folder
from qwen_lora.families.base import ForwardOptions
from qwen_lora.families.modules import ADAPTER
from qwen_lora.families.offload import ActivationOffload
from qwen_lora.families.qwen_image.blocks import Lengths, Pair, Rotations, join_texts, run_block
from qwen_lora.families.qwen_image.modulation import modulation_rows
from qwen_lora.families.qwen_image.sharded import is_sharded, take_over_forward
from qwen_lora.families.streaming import BlockStreamer

Block = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class OwnForward:
    """How `predict` runs a transformer; kept as `transformer.own_forward`."""

    def __init__(self, transformer: Any, options: ForwardOptions) -> None:
        self.recompute = options.recompute
        self.compiled = options.compiled
        self.sharded = is_sharded(transformer)
        if self.sharded:
            take_over_forward(transformer)
        self.run_block: Block = _compiled(run_block) if options.compiled else run_block
        self.streamer: BlockStreamer | None = getattr(transformer, "streamer", None)
        self.offload: ActivationOffload | None = None
        if options.offload_activations:
            self.offload = ActivationOffload(transformer.img_in.weight.device)
        loras = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
        self.lora_ranks = {layer.r[ADAPTER] for layer in loras}
        self.draws = any(
            isinstance(dropout, torch.nn.Dropout) and dropout.p > 0
            for layer in loras
            for dropout in layer.lora_dropout.values()
        )

    def begin(self) -> None:
        for part in (self.streamer, self.offload):
            if part is not None:
                part.begin()

    def way(self, index: int, blocks: int, run: Block) -> Block:
        """How to run block `index` now; its weights are on the device from here on."""
        streamed = False
        if self.streamer is not None:
            self.streamer.enter(index)
            streamed = index in self.streamer
            run = self.streamer.reentering(index, run)
        if not torch.is_grad_enabled():
            return run
        if not (streamed or self.recompute.applies_to(index, blocks)):
            return run
        run = _recomputed(run, self)
        return run if self.offload is None else _within(self.offload.keeping(index), run)


def _compiled(function: Block) -> Block:
    # One graph serves all blocks, whose weights are its inputs, and all buckets and captions, whose
    # token counts are symbols in it (see `predict`). What makes another one is listed here: the
    # first, a middle and the last block; gradients or none; a batch of one, of two, of any number.
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(18, _dynamo.config.recompile_limit)
    # Not in the system's temporary folder: the next run finds what this one has compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    return torch.compile(function)


def predict(
    transformer: Any,
    tokens: torch.Tensor,
    sigmas: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    grid: tuple[int, int],
) -> torch.Tensor:
    """tokens: [B, n, C] in the compute dtype; sigmas: [B], on the CPU where there is a table;
    prompts: B tensors [T_i, W], real tokens only; grid: (height, width) in tokens.
    Returns the predicted velocity, [B, n, C]."""
    how: OwnForward = transformer.own_forward
    text, lengths = join_texts(prompts)
    image = transformer.img_in(tokens)  # [B, n, D]
    text = transformer.txt_in(transformer.txt_norm(text))
    time = transformer.time_text_embed(sigmas.to(image.device, image.dtype), image)  # [B, D]
    rows = modulation_rows(transformer, sigmas, time)
    # A graph would be made for each combination of lengths: those batches run without one.
    block_of = how.run_block if lengths is None else run_block
    rotations = _rotations(
        transformer, grid, text.shape[1], lengths, real=block_of is not run_block
    )
    if block_of is not run_block:
        _mark_token_counts(image, text, rotations)
    last = len(transformer.transformer_blocks) - 1
    how.begin()
    for index, block in enumerate(transformer.transformer_blocks):
        run = how.way(index, last + 1, block_of)
        rest = (partial(rows, index), rotations, lengths, index == last)
        work = partial(_run_one, run, block, *rest)
        # Called as a module the block has its weights, also for its modulation.
        image, text = block(image, text, work) if how.sharded else work(image, text)
    return transformer.proj_out(transformer.norm_out(image, time))  # type: ignore[no-any-return]


def _run_one(
    run: Block,
    block: Any,
    rows: Callable[[], Pair],
    rotations: Rotations,
    lengths: Lengths,
    last: bool,
    image: torch.Tensor,
    text: torch.Tensor,
) -> Pair:
    return run(block, image, text, *rows(), rotations, lengths, last)


def _recomputed(run: Block, how: OwnForward) -> Block:
    context: dict[str, Any] = {}
    if how.recompute.kind == "selective":
        context["context_fn"] = partial(
            create_selective_checkpoint_contexts, _keep_products(how.lora_ranks)
        )
    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=how.draws, **context)


def _within(context: AbstractContextManager[Any], run: Block) -> Block:
    def inside(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with context:
            return run(*args)

    return inside


_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(lora_ranks: Collection[int]) -> Callable[..., CheckpointPolicy]:
    """Keep what matrix products and attention give, compute the rest anew. A LoRA's own product is
    a thin one (its contraction is the rank) that another product is added to: not kept."""

    def choose(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        if operator not in _KEPT:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if operator is torch.ops.aten.addmm.default and args[1].shape[1] in lora_ranks:
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    return choose


def _rotations(
    transformer: Any, grid: tuple[int, int], tokens: int, lengths: Lengths, *, real: bool
) -> Rotations:
    device = transformer.img_in.weight.device
    image, text = transformer.pos_embed(
        [[(1, *grid)]], max_txt_seq_len=max(lengths or [tokens]), device=device
    )  # complex [n, d / 2], [longest, d / 2]
    if lengths is not None:
        text = torch.cat([text[:count] for count in lengths])
    image, text = image[:, None], text[:, None]
    return Rotations(_parts(image), _parts(text)) if real else Rotations(image, text)


def _mark_token_counts(image: torch.Tensor, text: torch.Tensor, rotations: Rotations) -> None:
    from torch import _dynamo

    for tensor, dimension in ((image, 1), (text, 1)):
        _dynamo.maybe_mark_dynamic(tensor, dimension)
    for tensor in (*rotations.image, *rotations.text):
        _dynamo.maybe_mark_dynamic(tensor, 0)


def _parts(numbers: torch.Tensor) -> Pair:
    return numbers.real.contiguous(), numbers.imag.contiguous()
