# ruff: noqa: TID253
"""From settings and shard sets to the parts that a run trains with."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.modules import compute_dtype
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.shards.format import Manifest
from qwen_lora.shards.remote.cache import GIB
from qwen_lora.train.attention import choose_attention, measure_on, use_attention
from qwen_lora.train.base_model import base_of_all, content
from qwen_lora.train.checkpoint import Checkpoint, RunFacts, TrainState
from qwen_lora.train.cost.ways import Way
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.lora import LoraSpec, add_lora, load_lora_state, lora_state
from qwen_lora.train.lr_schedule import make_lr_scheduler
from qwen_lora.train.optimizer import build_optimizer, make_optimizer
from qwen_lora.train.optimizer_state import check_round_trip, pack_optimizer
from qwen_lora.train.plan import BatchRule, PlanTable, plan_id
from qwen_lora.train.preview_plan import wants_vae
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.restore import restore
from qwen_lora.train.resume import result_settings, share_of_step
from qwen_lora.train.sharding import base_mesh, shards_of_base
from qwen_lora.train.short_memory import ShortMemory
from qwen_lora.train.sources import Sources, model_name
from qwen_lora.train.step import SampleLosses, Stepper
from qwen_lora.train.timesteps import TimestepSampling
from qwen_lora.train.transformer import (
    check_transformer,
    choose_dtype,
    forward_options,
    load_base,
    modulation_table,
)
from qwen_lora.train.tree import pack
from qwen_lora.train.validation import (
    FIXED_TRAIN_IMAGES,
    Measure,
    chosen_sources,
    hold_out,
    report_split,
)

COMPONENTS = ("transformer", "scheduler")
MIN_VISITS = 0.001  # an epoch; with fewer the search for the next sample takes too long


@dataclass(frozen=True)
class DataPlan:
    """Which samples are trained on and which are measured, and how they are batched."""

    table: PlanTable
    measured: PlanTable
    measure_name: str
    rule: BatchRule
    accumulation: int  # micro-batches of a step on each rank
    held_out: frozenset[str]  # source sha256s kept out of training


@dataclass(frozen=True)
class Trainable:
    """The transformer with its LoRA, and what updates it."""

    transformer: torch.nn.Module
    spec: LoraSpec
    parameters: list[tuple[str, torch.nn.Parameter]]
    losses: SampleLosses
    stepper: Stepper
    dtype: torch.dtype
    memory: ShortMemory


def find_model(ranks: Ranks, settings: Settings, manifests: Sequence[Manifest]) -> ModelFolder:
    """One process of each machine downloads what is missing; nobody loads a weight before the
    transformer's config is known to fit the shards."""
    name = model_name(settings, manifests)
    components = (*COMPONENTS, "vae") if wants_vae(settings) else COMPONENTS
    file = settings.transformer_file

    def resolve() -> ModelFolder:
        return resolve_model(name, components, transformer_file=file)

    if ranks.world > 1:
        ranks.once_per_node(resolve)
    model = ranks.everywhere(resolve)
    check_transformer(model, manifests)
    return model


def plan_data(
    ranks: Ranks, settings: Settings, sources: Sources, recorded: RunFacts | None
) -> DataPlan:
    """Split, weigh and batch the samples; a resumed run keeps its micro-batches a step."""
    data = settings.data_config

    def gather(**chosen: Any) -> PlanTable:
        return PlanTable.from_sets(
            sources.sets,
            sources.weights,
            data.group_weights,
            kohya_repeats=data.kohya_repeats,
            **chosen,
        )

    table = gather()
    held = hold_out(sources_of(table, sources), settings.validation_fraction)
    if held:
        if ranks.is_main:
            report_split(held, len(set(sources_of(table, sources))))
        table = gather(exclude_sources=held)
        name, few = "validation_loss", chosen_sources(held, settings.validation_max_images)
    else:
        count = min(FIXED_TRAIN_IMAGES, settings.validation_max_images)
        name, few = "fixed_train_loss", chosen_sources(sources_of(table, sources), count)
    if (visits := float(table.weight.sum())) < MIN_VISITS:
        raise InputError(
            f"the weights of sets and groups give {visits:.3g} visits an epoch; raise them to at "
            f"least {MIN_VISITS} together"
        )
    micro_batches, accumulation = share_of_step(recorded, settings, ranks.world)
    rule = BatchRule(
        train_batch_size=settings.train_batch_size,
        micro_batches_per_step=micro_batches,
        seed=settings.seed,
        caption_dropout_rate=data.caption_dropout_rate,
        shuffle=settings.shuffle,
        batch_pixels=settings.batch_pixels,
    )
    return DataPlan(table, gather(only_sources=few), name, rule, accumulation, held)


def sources_of(table: PlanTable, sources: Sources) -> set[str]:
    """The source sha256s behind a table's rows."""
    columns = [shard_set.table.source_sha256 for shard_set in sources.sets]
    pairs = zip(table.set_index.tolist(), table.set_row.tolist(), strict=True)
    return {columns[index][row] for index, row in pairs}


def run_facts(
    ranks: Ranks,
    settings: Settings,
    sources: Sources,
    model: ModelFolder,
    plan: DataPlan,
    recorded: RunFacts | None,
) -> RunFacts:
    """What the result depends on; compared with the checkpoint's before a run continues."""
    return RunFacts(
        settings=result_settings(settings),
        compute_dtype=str(choose_dtype(settings, ranks.device)).removeprefix("torch."),
        micro_batches_per_step=plan.rule.micro_batches_per_step,
        plan_id=plan_id(plan.table, plan.rule),
        generations=sources.generations,
        fingerprints=sources.fingerprints,
        base_model=base_of_all(ranks, settings, model),
        scheduler=content(model, "scheduler") if settings.timestep_shift == "model" else None,
        attention=_attention(ranks, settings, model, plan, recorded),
    )


def chosen_here(settings: Settings, facts: RunFacts, way: Way) -> RunFacts:
    """The facts with what was chosen for this machine."""
    if settings.compile_blocks is not True:
        return replace(facts, compiled=False)
    recompute = str(way.recompute)
    return replace(facts, compiled=True, recompute=recompute, blocks_on_device=way.on_device)


def _attention(
    ranks: Ranks, settings: Settings, model: ModelFolder, plan: DataPlan, recorded: RunFacts | None
) -> str | None:
    """The attention kernel of the run: the recorded one, or what is fastest for its largest
    sample."""
    if recorded and settings.attention == "auto":
        return recorded.attention
    heads, width = model.family.attention_shape(model.config("transformer"))
    height, width_px = max(plan.table.bucket.tolist(), key=lambda size: size[0] * size[1])
    scale = model.family.latent_scale
    tokens = model.family.image_tokens((height // scale, width_px // scale))
    tokens += int(plan.table.token_counts.max(initial=0))
    dtype = choose_dtype(settings, ranks.device)
    measure = measure_on(ranks.device, dtype, (1, heads, tokens, width))
    chosen: str | None = ranks.on_main(
        lambda: choose_attention(settings.attention, ranks.device, measure)
    )
    return chosen


def build_trainable(
    ranks: Ranks,
    settings: Settings,
    model: ModelFolder,
    facts: RunFacts,
    way: Way,
    resumed: Checkpoint | None,
) -> Trainable:
    """Load the base, add the LoRA, make the optimizer and schedule; put a checkpoint's state in."""
    ranks.everywhere(lambda: _check_optimizer(settings, ranks.device))
    use_attention(facts.attention)

    def find_table() -> Path | None:
        return modulation_table(model, settings, ranks.device, facts.base_model)

    ranks.once_per_node(find_table)
    mesh = base_mesh(ranks, settings)
    transformer = ranks.everywhere(
        lambda: load_base(model, settings, ranks.device, find_table(), mesh, way.on_device)
    )
    spec = LoraSpec.from_settings(settings)
    parameters = add_lora(transformer, spec, model.family, settings.seed)
    model.family.prepare_training(
        transformer, forward_options(settings, way.recompute, stay=way.stay)
    )
    if resumed:
        load_lora_state(transformer, resumed.lora)
    ranks.check_equal(_content_hash(lora_state(transformer)), "the LoRA's initial weights")
    dtype = compute_dtype(transformer)
    memory = ShortMemory(
        settings,
        model,
        transformer,
        way,
        dtype,
        shards_of_base(settings, ranks.world),
        f"process {ranks.rank}: " if ranks.world > 1 else "",
    )
    optimizer, flat = memory.optimizer(
        "the LoRA's gradients", lambda: build_optimizer(parameters, settings)
    )
    if flat is not None:
        flat.cast_together(transformer)
    scheduler = make_lr_scheduler(optimizer, settings)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    def make_state() -> None:
        if resumed:
            restore(optimizer, flat, scheduler, scaler, parameters, resumed, settings)
        if flat is not None and not optimizer.state:
            flat.make_state(optimizer)

    memory.optimizer("the optimizer's state", make_state)
    losses = SampleLosses(transformer, model.family, settings.loss_weighting)
    transformer.train()  # LoRA dropout; the frozen base has none of its own
    stepper = Stepper(
        ranks,
        losses,
        [parameter for _, parameter in parameters],
        optimizer,
        scheduler,
        scaler,
        settings,
        memory,
        flat,
    )
    return Trainable(transformer, spec, parameters, losses, stepper, dtype, memory)


def _check_optimizer(settings: Settings, device: torch.device) -> None:
    """Errors in the optimizer's and the schedule's settings show before minutes of loading."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    make_lr_scheduler(torch.optim.SGD([parameter], lr=settings.learning_rate), settings)
    check_round_trip(lambda named: make_optimizer(named, settings), device)


def build_loaders(
    ranks: Ranks,
    settings: Settings,
    sources: Sources,
    model: ModelFolder,
    plan: DataPlan,
    trainable: Trainable,
) -> tuple[BatchLoader, Measure]:
    sampling = TimestepSampling.from_settings(
        settings,
        compute_dtype=trainable.dtype,
        family=model.family,
        scheduler_config=model.config("scheduler"),
    )
    on_gpu = ranks.device.type == "cuda"
    loader = BatchLoader(
        sources.sets,
        plan.table,
        plan.rule,
        sampling,
        read_ahead=settings.read_ahead,
        pin_memory=on_gpu,
        download_ahead_bytes=int(settings.shard_cache_gib * GIB) // 2,  # the rest is in use
        tokens_for=model.family,
    )
    # The measure must not depend on the run's seed.
    fixed = BatchRule(train_batch_size=1, micro_batches_per_step=1, seed=0)
    measured = BatchLoader(
        sources.sets, plan.measured, fixed, sampling, read_ahead=0, pin_memory=on_gpu
    )
    measure = Measure(
        plan.measure_name,
        ranks,
        trainable.losses,
        plan.measured,
        measured,
        trainable.memory,
        in_step=settings.shard_base != "none",
        # LoRA dropout makes other graphs of training, activations would travel for nothing.
        compiled=settings.compile_blocks is True
        and settings.lora_dropout == 0
        and not settings.offload_activations,
    )
    return loader, measure


def snapshot(trainable: Trainable, facts: RunFacts, state: TrainState) -> Checkpoint:
    """A checkpoint's content, on the host."""
    stepper = trainable.stepper
    tensors: dict[str, torch.Tensor] = {}
    optimizer = pack_optimizer(stepper.optimizer, trainable.parameters, tensors, stepper.flat)
    nothing: dict[str, torch.Tensor] = {}
    return Checkpoint(
        facts=facts,
        state=state,
        lora={
            name: tensor.detach().cpu().contiguous()
            for name, tensor in lora_state(trainable.transformer).items()
        },
        optimizer_tensors=tensors,
        optimizer=optimizer,
        scheduler=pack(stepper.scheduler.state_dict(), "scheduler", nothing),
        scaler=pack(stepper.scaler.state_dict(), "scaler", nothing),
    )


def _content_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def say_what_runs(
    ranks: Ranks, settings: Settings, plan: DataPlan, trainable: Trainable, step: int
) -> None:
    if not ranks.is_main:
        return
    numbers = sum(parameter.numel() for _, parameter in trainable.parameters)
    samples = f"{len(plan.table)} samples"
    if plan.table.duplicates:
        samples += f" ({plan.table.duplicates} duplicates left out)"
    begin = f"continuing at step {step}" if step else "starting"
    print(
        f"{begin}: {samples}, {settings.max_train_steps} steps of "
        f"{plan.rule.micro_batches_per_step} micro-batches of up to {settings.train_batch_size}; "
        f"LoRA rank {settings.rank} with {numbers:,} parameters; "
        f"{str(trainable.dtype).removeprefix('torch.')} on {ranks.device.type}, "
        f"{ranks.world} process(es), accumulation {plan.accumulation}",
        file=sys.stderr,
    )
