# ruff: noqa: TID253
"""The transformer's forward pass for training, on the modules of diffusers' own model.

Same numbers as `QwenImageTransformer2DModel.forward` on text-to-image inputs, with three
differences: modulation may come from a table (modulation.py), the last block leaves out what only
its text output needs, and prompts of different lengths are neither padded nor masked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
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

from qwen_lora.families.base import ForwardOptions, among
from qwen_lora.families.lora_cast import LoraCast
from qwen_lora.families.modules import ADAPTER
from qwen_lora.families.offload import CHECKPOINTED, COMPILED, ActivationOffload
from qwen_lora.families.qwen_image.blocks import (
    Lengths,
    Pair,
    Rotations,
    join_texts,
    owners,
    run_block,
)
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
        self.streamer: BlockStreamer | None = getattr(transformer, "streamer", None)
        self.offload: ActivationOffload | None = None
        self._weights: frozenset[int] = frozenset()  # their storages
        self._shared: frozenset[int] = frozenset()  # and those of the rotations
        if options.offload_activations:
            self.offload = ActivationOffload(
                transformer.img_in.weight.device,
                _staying(len(transformer.transformer_blocks), options),
            )
            if not self.sharded:  # spread weights have none, and are not asked for
                self._weights = _storages((*transformer.parameters(), *transformer.buffers()))
        loras = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
        self.lora_ranks = {layer.r[ADAPTER] for layer in loras}
        self.draws = any(
            isinstance(dropout, torch.nn.Dropout) and dropout.p > 0
            for layer in loras
            for dropout in layer.lora_dropout.values()
        )
        # What has a memory budget instead of being run again, and what is run again: LoRA dropout
        # must come out the same, spread weights have left.
        self._budgeted = options.compiled and not self.draws and not self.sharded
        self._run: Block = run_block
        self._run_again: Block = run_block
        if options.compiled:
            from qwen_lora.families.qwen_image.compiled import CompiledBlock

            budget = options.recompute.budget(len(transformer.transformer_blocks))
            self._run_again = CompiledBlock(1.0)
            self._run = CompiledBlock(budget) if self._budgeted else self._run_again

    def begin(self, rotations: Rotations, loras: LoraCast | None, dtype: torch.dtype) -> None:
        """A pass begins in which all blocks share these rotations. loras: for weights in `dtype`
        that are cast together."""
        cast = [] if loras is None else loras.begin(dtype)
        if self.offload is not None and self._budgeted:
            shared = [*rotations.image, *rotations.text, *cast]
            self._shared = self._weights | _storages(shared)
        for part in (self.streamer, self.offload):
            if part is not None:
                part.begin()

    def way(self, index: int, blocks: int) -> Block:
        """How to run block `index` now; its weights are on the device from here on."""
        training = torch.is_grad_enabled()
        again = training and self._runs_again(index, blocks)
        run = self._run_again if again else self._run
        if self.streamer is not None:
            self.streamer.enter(index)
            entered = self.streamer.reentering if again else self.streamer.entering
            run = entered(index, run)
        if again:
            run = _recomputed(run, self)
        if training and self.offload is not None:
            if again:
                run = _within(self.offload.keeping(index), run)
            elif self._budgeted and self.recompute.kind != "none":
                run = _within(self.offload.keeping(index, self._shared), run)
        return run

    def _runs_again(self, index: int, blocks: int) -> bool:
        if self._budgeted:
            return False
        if self.streamer is not None and index in self.streamer:
            return True
        if self.compiled and self.recompute.kind == "selective":
            return False  # its graphs compute element-wise work anew by themselves
        return self.recompute.applies_to(index, blocks)


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
    owner = owners(lengths, image.device)
    rotations = _rotations(transformer, grid, text.shape[1], lengths, real=how.compiled)
    last = len(transformer.transformer_blocks) - 1
    if how.compiled and torch.is_grad_enabled():
        # As in front of every other block: else the first would make a graph of its own, and
        # compiling takes longer than a few gradients that nobody uses.
        for stream in (image, text):
            if not stream.requires_grad:
                stream.requires_grad_()
    how.begin(rotations, getattr(transformer, "lora_cast", None), image.dtype)
    for index, block in enumerate(transformer.transformer_blocks):
        run = how.way(index, last + 1)
        rest = (partial(rows, index), rotations, owner, lengths, index == last)
        work = partial(_run_one, run, block, *rest)
        # Called as a module the block has its weights, also for its modulation.
        image, text = block(image, text, work) if how.sharded else work(image, text)
    return transformer.proj_out(transformer.norm_out(image, time))  # type: ignore[no-any-return]


def _run_one(
    run: Block,
    block: Any,
    rows: Callable[[], Pair],
    rotations: Rotations,
    owner: torch.Tensor | None,
    lengths: Lengths,
    last: bool,
    image: torch.Tensor,
    text: torch.Tensor,
) -> Pair:
    return run(block, image, text, *rows(), rotations, owner, lengths, last)


def _recomputed(run: Block, how: OwnForward) -> Block:
    context: dict[str, Any] = {}
    if how.recompute.kind == "selective":
        context["context_fn"] = partial(
            create_selective_checkpoint_contexts, _keep_products(how.lora_ranks)
        )
    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=how.draws, **context)


def _staying(blocks: int, options: ForwardOptions) -> set[int]:
    """Blocks whose activations stay on the device: the last ones, whose would not have left when
    the backward pass wants them back, and some of the others."""
    others = max(0, blocks - (COMPILED if options.compiled else CHECKPOINTED))
    chosen = min(options.activations_on_device, others)
    some = {block for block in range(others) if among(block, chosen, others)}
    return some | set(range(others, blocks))


def _storages(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


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


def _parts(numbers: torch.Tensor) -> Pair:
    return numbers.real.contiguous(), numbers.imag.contiguous()
