# ruff: noqa: TID253
"""`qwen-lora plan --check`: what the base's precision does to the loss and to the LoRA's gradients,
on the user's own model, shards and card.

The base is loaded twice, one after the other: in the compute type and as the settings hold it. Both
see the first micro-batch of a run with these settings, with the same LoRA, whose B is random, for a
new LoRA's zeros would keep A from having a gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen_lora.config.schema import Settings, ShardSource
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.hashing import hash_json
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.train.base_model import base_fingerprint
from qwen_lora.train.cost.choice import usable_bytes
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.data import BatchLoader, LoadedBatch
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss
from qwen_lora.train.plan import BatchRule
from qwen_lora.train.sources import model_name
from qwen_lora.train.table import PlanTable
from qwen_lora.train.timesteps import TimestepSampling
from qwen_lora.train.transformer import (
    check_transformer,
    choose_dtype,
    load_base,
    modulation_table,
)

B_SIZE = 0.01  # standard deviation of the random B
FULL = Recompute("full")


@dataclass(frozen=True)
class Measured:
    """What one base gives for the batch."""

    loss: float
    gradients: torch.Tensor  # of all LoRA parameters, one behind the other, float32 on the CPU
    streamed: bool  # the blocks lay in host memory


def check_precision(settings: Settings) -> dict[str, Any]:
    """What `format_check` shows, as JSON values. Raises InputError when there is nothing to compare
    with."""
    if settings.base_precision == "bf16":
        raise InputError(
            "--check compares a base of low precision with one in the compute type; name it, for "
            "example with --set base_precision=fp8"
        )
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    low = settings.model_copy(update={"own_forward": True, "compile_blocks": False})
    full = low.model_copy(update={"base_precision": "bf16", "low_precision_products": "none"})
    model, batch = _first_batch(settings, device)
    measured = [_measure(model, one, batch, device) for one in (full, low)]
    exact, found = measured
    dtype = choose_dtype(settings, device)
    return {
        "base_precision": settings.base_precision,
        "low_precision_products": settings.low_precision_products,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "samples": batch.size,
        "noise_levels": [round(sigma, 4) for sigma in batch.sigmas.tolist()],
        "streamed": [one.streamed for one in measured],
        "losses": [one.loss for one in measured],
        "loss_difference": (found.loss - exact.loss) / exact.loss,
        **_compare(exact.gradients, found.gradients),
    }


def format_check(facts: dict[str, Any]) -> str:
    products = facts["low_precision_products"]
    levels = ", ".join(f"{level:g}" for level in facts["noise_levels"])
    before, after = facts["losses"]
    lines = [
        f"{facts['base_precision']}{'' if products == 'none' else f', products: {products},'} "
        f"beside {facts['dtype']} on {facts['device']}: the first batch, {facts['samples']} "
        f"sample(s) at noise level {levels}, a LoRA with random B",
        f"loss: {before:.6f} and {after:.6f}, {100 * facts['loss_difference']:+.4f} %",
        f"LoRA gradients: cosine {facts['gradient_cosine']:.6f}, difference "
        f"{100 * facts['gradient_difference']:.3f} % of their norm, norm "
        f"{100 * (facts['gradient_norm_ratio'] - 1):+.3f} %",
    ]
    if any(facts["streamed"]):
        lines.append("what did not fit the GPU was copied from host memory block by block")
    return "\n".join(lines)


def _compare(exact: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    a, b = exact.double(), found.double()
    return {
        "gradient_cosine": float(a @ b / (a.norm() * b.norm())),
        "gradient_difference": float((b - a).norm() / a.norm()),
        "gradient_norm_ratio": float(b.norm() / a.norm()),
    }


# ---- one base ------------------------------------------------------------------------------------


def _measure(
    model: ModelFolder, settings: Settings, batch: LoadedBatch, device: torch.device
) -> Measured:
    named = base_fingerprint(model)
    table = modulation_table(model, settings, device, named)
    streamed = not _fits(model, settings, batch, device)
    on_device = 0 if streamed else None
    try:
        transformer = load_base(model, settings, device, table, blocks_on_device=on_device)
        spec = LoraSpec.from_settings(settings)
        parameters = add_lora(transformer, spec, model.family, settings.seed)
        _shake(parameters)
        model.family.prepare_training(transformer, ForwardOptions(recompute=FULL))
        there = batch.to(device)
        losses = flow_matching_loss(
            transformer,
            there.latents,
            there.prompt_embeds,
            there.prompt_masks,
            there.noise,
            there.sigmas,
            weighting_scheme=settings.loss_weighting,
            family=model.family,
        )
        loss = losses.mean()
        loss.backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError as error:
        raise QwenLoraError(
            f"the GPU's memory is too small to check base_precision {settings.base_precision} with "
            "this batch; lower train_batch_size, or close other programs on this GPU"
        ) from error
    flat = [p.grad.float().flatten().cpu() for _, p in parameters if p.grad is not None]
    found = Measured(float(loss.detach()), torch.cat(flat), streamed)
    del transformer, parameters, there, losses, loss
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _fits(model: ModelFolder, settings: Settings, batch: LoadedBatch, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    height, width = batch.latents.shape[-2:]
    texts = tuple(len(embeds) for embeds in batch.prompt_embeds)
    step = StepModel(model, settings, choose_dtype(settings, device))
    free, total = torch.cuda.mem_get_info(device)
    return step.cost(Shape((height, width), texts), FULL).peak <= usable_bytes(total, free)


def _shake(parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
    """Random B, a function of the parameter's name alone."""
    for name, parameter in parameters:
        if ".lora_B." in name:
            key = int(hash_json(["check", name])[:32], 16)
            random = np.random.Generator(np.random.Philox(key=key))
            values = random.standard_normal(tuple(parameter.shape), np.float32)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(B_SIZE * values))


# ---- the batch -----------------------------------------------------------------------------------


def _first_batch(settings: Settings, device: torch.device) -> tuple[ModelFolder, LoadedBatch]:
    """Of a run's first epoch, without held-out images taken away."""
    chosen = settings.shards or [ShardSource(path=settings.shards_dir)]
    cache = ShardCache.default(settings.shard_cache_dir, settings.shard_cache_gib)
    data = settings.data_config
    with ExitStack() as stack:
        sets = []
        for source in chosen:
            sets.append(ShardSet.open(source.path, cache=cache))
            stack.callback(sets[-1].close)
        manifests = [shard_set.manifest for shard_set in sets]
        model = resolve_model(
            model_name(settings, manifests),
            ("transformer", "scheduler"),
            transformer_file=settings.transformer_file,
        )
        check_transformer(model, manifests)
        weights = [source.weight for source in chosen]
        table = PlanTable.from_sets(
            sets, weights, data.group_weights, kohya_repeats=data.kohya_repeats
        )
        rule = BatchRule(
            train_batch_size=settings.train_batch_size,
            micro_batches_per_step=settings.gradient_accumulation_steps,
            seed=settings.seed,
            caption_dropout_rate=data.caption_dropout_rate,
            shuffle=settings.shuffle,
            batch_pixels=settings.batch_pixels,
        )
        sampling = TimestepSampling.from_settings(
            settings,
            compute_dtype=choose_dtype(settings, device),
            family=model.family,
            scheduler_config=model.config("scheduler"),
        )
        loader = BatchLoader(sets, table, rule, sampling, read_ahead=0)
        return model, loader.load(loader.plan(0).micro_batch(0), epoch=0)
