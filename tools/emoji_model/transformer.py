"""Trains all of a small `QwenImageTransformer2DModel` from a shard set, with the project's loss.

The objective is `qwen_lora.train.flow_matching_loss`: what a LoRA of this model is trained with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.objective import flow_matching_loss
from tools.emoji_model.state import Log, load_state, save_state
from tools.emoji_model.text import TEXT_WIDTH

CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (8, 12, 12),
}


@dataclass(frozen=True)
class TransformerRecipe:
    steps: int = 8000
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.01
    dropout: float = 0.1  # share of samples without a prompt, for guidance
    average: float = 0.999  # of the moving average of the weights, which is what is kept
    seed: int = 0
    save_every: int = 500
    compiled: bool = True


@dataclass(frozen=True)
class Cache:
    """A whole shard set in memory, prompts padded to one of two lengths.

    Two, because a compiled block is compiled for each length, and one would be mostly padding.
    """

    latents: torch.Tensor  # [N, C, h, w] float32
    groups: list[PromptGroup]  # short names, then long ones


@dataclass(frozen=True)
class PromptGroup:
    """Rows of the cache whose prompts are padded to one length. n rows, T tokens of width D."""

    rows: torch.Tensor  # [n] int64
    prompt_embeds: torch.Tensor  # [n, T, D] bf16
    masks: torch.Tensor  # [n, T] bool
    empty_embeds: torch.Tensor  # [T, D] bf16, the embedding of " "
    empty_mask: torch.Tensor  # [T] bool


def read_cache(folder: Path, short: int = 12) -> Cache:
    """short: tokens of the longest prompt in the first group."""
    with ShardSet.open(folder) as shards:
        records = [shards.read(row) for row in range(len(shards.table.sample_id))]
        empty, _ = shards.unconditional()
    latents = torch.stack([record.tensors["latents"].float() for record in records])
    embeds = [record.tensors["prompt_embeds.0"] for record in records]
    groups = []
    longest = max(len(embed) for embed in embeds)
    for low, high in ((0, short), (short, longest)):
        rows = [row for row, embed in enumerate(embeds) if low < len(embed) <= high]
        if not rows:
            continue
        padded, masks = zip(*(_padded(embeds[row], high) for row in rows), strict=True)
        groups.append(
            PromptGroup(
                torch.tensor(rows), torch.stack(padded), torch.stack(masks), *_padded(empty, high)
            )
        )
    return Cache(latents, groups)


def _padded(embed: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, D] -> [length, D] and its mask [length]."""
    padded = embed.new_zeros(length, embed.shape[1])
    padded[: len(embed)] = embed
    return padded, torch.arange(length) < len(embed)


def batch_loss(
    transformer: nn.Module, cache: Cache, recipe: TransformerRecipe, step: int
) -> torch.Tensor:
    """The mean loss of step `step`'s batch, which depends on the seed and the step alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    sizes = torch.tensor([float(len(group.rows)) for group in cache.groups])
    group = cache.groups[int(torch.multinomial(sizes, 1, generator=generator))]
    picked = torch.randint(len(group.rows), (recipe.batch,), generator=generator)
    empty = torch.rand(recipe.batch, generator=generator) < recipe.dropout
    embeds = torch.where(empty[:, None, None], group.empty_embeds, group.prompt_embeds[picked])
    masks = torch.where(empty[:, None], group.empty_mask, group.masks[picked])
    latents = cache.latents[group.rows[picked]]  # [B, C, h, w]
    noise = torch.randn(latents.shape, generator=generator)
    # Logit-normal noise levels, one in each of B equal parts of the distribution.
    parts = torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)
    uniform = (parts / recipe.batch).clamp(1e-4, 1 - 1e-4)
    sigmas = torch.sigmoid(math.sqrt(2.0) * torch.erfinv(2 * uniform - 1))  # [B]
    losses = flow_matching_loss(transformer, latents, list(embeds), list(masks), noise, sigmas)
    return losses.mean()


def train_transformer(
    folder: Path,
    cache: Cache,
    recipe: TransformerRecipe,
    look: Callable[[int, Any], None] = lambda step, transformer: None,
) -> Any:
    """Keeps its state under `folder`; returns the transformer with averaged weights.

    look: called with the averaged model after every eighth of the steps.
    """
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(recipe.seed)
    transformer = QwenImageTransformer2DModel(**CONFIG)
    averaged = QwenImageTransformer2DModel(**CONFIG)
    averaged.load_state_dict(transformer.state_dict())
    averages = dict(averaged.named_parameters())
    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    state = folder / "transformer-state.safetensors"
    first = load_state(state, transformer, optimizer, averages)
    log = Log(folder / "transformer.jsonl", first)
    if recipe.compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    began, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _decay(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            loss = batch_loss(transformer, cache, recipe, step)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(recipe.average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(averages.values()), list(transformer.parameters()), 1.0 - keep
            )
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            line = {"step": step + 1, "loss": sum(losses) / len(losses), "grad_norm": norm.item()}
            log.write({**line, "seconds_per_step": seconds})
            losses.clear()
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save_state(state, step + 1, transformer, optimizer, averages)
        if (step + 1) % max(1, recipe.steps // 8) == 0:
            look(step + 1, averaged.eval())
    return averaged.eval()


def _decay(step: int, recipe: TransformerRecipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))
