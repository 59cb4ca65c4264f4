# ruff: noqa: TID253
"""`qwen-lora plan`: memory, FLOPs and time of a run before it is started, from configs alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_lora.config.schema import Settings, ShardSource
from qwen_lora.errors import InputError
from qwen_lora.families.base import Recompute
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.train.compiling import settle_compile
from qwen_lora.train.cost.choice import (
    GIB,
    SIDES,
    blocks_that_fit,
    choose,
    too_small,
    usable_bytes,
)
from qwen_lora.train.cost.copies import copy_rate
from qwen_lora.train.cost.duration import find_pace, step_time
from qwen_lora.train.cost.rates import NOMINAL
from qwen_lora.train.cost.shapes import (
    BucketLoad,
    Shape,
    bucket_loads,
    largest_load,
    latent_size,
)
from qwen_lora.train.cost.step import Cost, StepModel
from qwen_lora.train.metrics import FILE, read_metrics
from qwen_lora.train.plan import BatchRule
from qwen_lora.train.sharding import shards_of_base
from qwen_lora.train.sources import model_name
from qwen_lora.train.table import PlanTable
from qwen_lora.train.transformer import DTYPES, check_transformer

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GB, as they are sold
MOST_STREAMED = 32  # GB, of the cards whose blocks are counted
PRECISIONS = ("bf16", "fp8", "int8", "nf4")
WAYS = ("full", "selective", "none")


def estimate(
    settings: Settings,
    memory_gib: float | None = None,
    tflops: float | None = None,
    run: Path | None = None,
    h2d: float | None = None,
    tflops_8bit: float | None = None,
) -> dict[str, Any]:
    """What `format_estimate` shows, as JSON values. tflops, tflops_8bit: of products in the compute
    dtype and in 8 bits; h2d: GB/s of copies to the GPU."""
    if torch.cuda.is_available():
        settings = settle_compile(settings, torch.device("cuda"), None)
    model, loads = _read(settings)
    family = model.family
    dtype = DTYPES["bf16" if settings.mixed_precision == "auto" else settings.mixed_precision]
    parts = shards_of_base(settings, settings.num_processes)
    step_model = StepModel(model, settings, dtype, parts)
    load = largest_load(loads, family)
    shape = load.largest(family)
    usable = _usable(memory_gib)
    pace = find_pace(step_model, shape, usable, tflops, tflops_8bit, h2d)
    choice = choose(step_model, shape, usable, pace)
    if choice.cost.traffic and pace.copies is None:
        pace = replace(pace, copies=copy_rate(True, h2d))
    time = step_time(step_model, loads, choice, pace, measured=h2d is None)
    facts: dict[str, Any] = {
        "model": model.model_id,
        "parameters": step_model.parameters,
        "held_parameters": step_model.held_parameters,
        "lora_parameters": step_model.lora_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "base_precision": settings.base_precision,
        "own_forward": settings.own_forward,
        "rank": settings.rank,
        "lora_targets": settings.lora_targets,
        "optimizer": settings.optimizer,
        "largest": {
            "bucket": list(load.bucket),
            "batch": load.batch,
            "image_tokens": family.image_tokens(shape.latent_size),
            "text_tokens": load.longest,
        },
        "recompute": str(choice.recompute),
        "blocks": step_model.blocks,
        "blocks_on_device": (
            step_model.blocks if choice.way.on_device is None else choice.way.on_device
        ),
        "activations_on_device": choice.way.stay,
        "host_gib": round(choice.cost.host / GIB, 6),
        "usable_gib": None if usable is None else round(usable / GIB, 3),
        "missing_gib": round(choice.missing / GIB, 3),
        "memory_gib": _memory(choice.cost),
        **time.facts(settings.max_train_steps),
        "table": _table(model, settings, dtype, load, parts),
    }
    if choice.missing:
        facts["does_not_fit"] = too_small(step_model, shape, choice)
    if run is not None:
        facts["run"] = _compare(run, time.seconds)
    return facts


# ---- what is planned -----------------------------------------------------------------------------


def _read(settings: Settings) -> tuple[ModelFolder, list[BucketLoad]]:
    """The model's config and the samples' sizes; no weight and no record is read."""
    chosen = settings.shards or [ShardSource(path=settings.shards_dir)]
    cache = ShardCache.default(settings.shard_cache_dir, settings.shard_cache_gib)
    data = settings.data_config
    with ExitStack() as stack:
        sets = []
        for source in chosen:
            sets.append(ShardSet.open(source.path, cache=cache))
            stack.callback(sets[-1].close)
        table = PlanTable.from_sets(
            sets,
            [source.weight for source in chosen],
            data.group_weights,
            kohya_repeats=data.kohya_repeats,
        )
        manifests = [shard_set.manifest for shard_set in sets]
        model = resolve_model(
            model_name(settings, manifests),
            ("transformer",),
            weights=False,
            transformer_file=settings.transformer_file,
        )
        check_transformer(model, manifests)
    return model, bucket_loads(table, _rule(settings))


def _rule(settings: Settings) -> BatchRule:
    return BatchRule(
        train_batch_size=settings.train_batch_size,
        micro_batches_per_step=settings.gradient_accumulation_steps,
        seed=settings.seed,
        caption_dropout_rate=settings.data_config.caption_dropout_rate,
        batch_pixels=settings.batch_pixels,
    )


def _usable(memory_gib: float | None) -> int | None:
    """Of the card that is named, or of the one in this machine."""
    if memory_gib is not None:
        return usable_bytes(int(memory_gib * GIB))
    if torch.cuda.is_available():
        return usable_bytes(torch.cuda.mem_get_info()[1])
    return None


def _memory(cost: Cost) -> dict[str, float]:
    parts = {
        "weights": cost.weights,
        "lora_and_optimizer": cost.lora,
        "activations": cost.activations,
        "workspace": cost.workspace,
        "peak": cost.peak,
    }
    return {name: round(value / GIB, 6) for name, value in parts.items()}


# ---- other settings ------------------------------------------------------------------------------


def smallest_card(peak: int) -> int | None:
    return next((card for card in CARDS if peak <= usable_bytes(card * GIB)), None)


def _table(
    model: ModelFolder, settings: Settings, dtype: torch.dtype, load: BucketLoad, parts: int
) -> list[dict[str, Any]]:
    """Square images with this run's batch, text and LoRA."""
    batches = _rule(settings).sizes(np.array([[side, side] for side in SIDES], np.int32)).tolist()
    ways = WAYS if settings.own_forward else ("full", "none")
    rows = []
    for precision in PRECISIONS:
        other = settings.model_copy(update={"base_precision": precision})
        step_model = StepModel(model, other, dtype, parts if precision == "bf16" else 1)
        shapes = [
            Shape(latent_size(model.family, (side, side)), (load.longest,) * batch)
            for side, batch in zip(SIDES, batches, strict=True)
        ]
        peaks = {way: peaks_of(step_model, shapes, Recompute.parse(way)) for way in ways}
        for index, side in enumerate(SIDES):
            row: dict[str, Any] = {"base_precision": precision, "side": side}
            for way in ways:
                peak = peaks[way][index]
                row[way] = {"gib": round(peak / GIB, 4), "card_gb": smallest_card(peak)}
            if settings.own_forward:
                row["blocks_on_device"] = {
                    str(card): blocks_that_fit(
                        step_model, peaks["full"][index], usable_bytes(card * GIB)
                    )
                    for card in CARDS
                    if card <= MOST_STREAMED
                }
            rows.append(row)
    return rows


def peaks_of(model: StepModel, shapes: Sequence[Shape], recompute: Recompute) -> list[int]:
    """Of shapes that differ in image size. For one batch size bytes are linear in image tokens, up
    to a change of the worst moment, so the two ends tell the others."""
    if len({shape.text_tokens for shape in shapes}) > 1:
        return [model.cost(shape, recompute).peak for shape in shapes]
    first, last = (model.cost(shape, recompute).peak for shape in (shapes[0], shapes[-1]))
    tokens = [model.family.image_tokens(shape.latent_size) for shape in shapes]
    slope = (last - first) / (tokens[-1] - tokens[0])
    return [round(first + slope * (count - tokens[0])) for count in tokens]


# ---- a run ---------------------------------------------------------------------------------------


def _compare(run: Path, floor: float) -> dict[str, Any]:
    path = run / FILE if run.is_dir() else run
    try:
        rows = [row for row in read_metrics(path) if "step_seconds" in row]
    except OSError as error:
        raise InputError(f"--run: {path} cannot be read: {error.strerror}") from None
    if not rows:
        raise InputError(f"--run: {path} holds no line with step_seconds; name a run's folder")
    seconds = statistics.median(row["step_seconds"] for row in rows)
    compared: dict[str, Any] = {"step_seconds": seconds, "share_of_floor": floor / seconds}
    peaks = [row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row]
    if peaks:
        compared["peak_memory_gib"] = max(peaks)
    return compared


# ---- text ----------------------------------------------------------------------------------------


def format_estimate(facts: dict[str, Any]) -> str:
    memory, large = facts["memory_gib"], facts["largest"]
    height, width = large["bucket"]
    targets = facts["lora_targets"]
    held = f", {facts['held_parameters']:,} of them held (the rest is the modulation table)"
    if facts["held_parameters"] == facts["parameters"]:
        held = ""
    limit = f" (usable: {_size(facts['usable_gib'])})" if facts["usable_gib"] is not None else ""
    lines = [
        f"{facts['model']}: {facts['parameters']:,} parameters{held}",
        f"LoRA: rank {facts['rank']} on "
        f"{targets if isinstance(targets, str) else ', '.join(targets)}, "
        f"{facts['lora_parameters']:,} parameters, {facts['optimizer']}",
        f"largest micro-batch: {large['batch']} x {height} x {width} px "
        f"({large['image_tokens']} tokens) with {large['text_tokens']} text tokens",
        f"base_precision {facts['base_precision']}, computing in {facts['dtype']}, "
        f"recompute {facts['recompute']}",
        f"peak memory: {_size(memory['peak'])}{limit} = weights {_size(memory['weights'])} + LoRA "
        f"and optimizer {_size(memory['lora_and_optimizer'])} + activations "
        f"{_size(memory['activations'])} + workspace {_size(memory['workspace'])}",
        _step_line(facts),
        f"{facts['max_train_steps']} steps: at least {_duration(facts['floor_seconds'])}",
    ]
    rate = facts["copies_gb_per_s"]
    how = "measured here" if facts["copies_measured"] else "as given"
    at = f" at {rate:.3g} GB/s ({how})" if rate else " (--h2d tells how fast)"
    if facts["offloaded_gib_per_step"]:
        lines.insert(
            -2,
            f"activations: a step copies {_size(facts['offloaded_gib_per_step'])} to host memory "
            f"and back{at}; those of {facts['activations_on_device']} blocks and of the last stay",
        )
    if facts["blocks_on_device"] < facts["blocks"]:
        lines.insert(
            -2,
            f"{facts['blocks_on_device']} of {facts['blocks']} blocks stay on the device, the "
            f"others lie in {_size(facts['host_gib'])} of host memory; a step copies "
            f"{_size(facts['copied_gib_per_step'])}{at}",
        )
    if (run := facts.get("run")) is not None:
        lines.append(
            f"the run: {run['step_seconds']:.3g} s a step, {100 * run['share_of_floor']:.0f} % of "
            + ("those rates" if facts["flops_per_step_8bit"] else "that rate")
            + (f", peak {run['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in run else "")
        )
    lines += ["", *_table_lines(facts["table"]), ""]
    if facts["own_forward"]:
        lines += [*_streaming_lines(facts["table"], facts["blocks"]), ""]
    lines.append(
        "Arithmetic from the model's config. On an H200 the peaks at 512 to 1024 px were "
        "within 1.5 % of it, in bf16, fp8, int8 and nf4 (2.4 % with all blocks streamed). Cards: "
        "GiB + 5 %, at least 1 GiB, for what is not counted."
    )
    return "\n".join(lines)


def _step_line(facts: dict[str, Any]) -> str:
    whole, low = facts["flops_per_step"], facts["flops_per_step_8bit"]
    floor = _duration(facts["floor_seconds_per_step"])
    origin = "measured here" if facts["rate_measured"] else "as given"
    rate = f"{facts['rate_tflops']:.4g} TFLOP/s ({origin})"
    line = f"a step: {whole / 1e12:.4g} TFLOP, at least {floor}"
    if not low:
        return f"{line} at {rate}"
    origins = {
        "measured": "measured here",
        "given": "as given",
        "assumed": f"assumed, {NOMINAL:g} x the other; --tflops-8bit tells it",
    }
    return (
        f"{line}: {(whole - low) / 1e12:.4g} TFLOP at {rate} and {low / 1e12:.4g} TFLOP in "
        f"{facts['base_precision']} products at {facts['rate_8bit_tflops']:.4g} TFLOP/s "
        f"({origins[facts['rate_8bit_from']]})"
    )


def _table_lines(rows: list[dict[str, Any]]) -> list[str]:
    ways = [way for way in WAYS if way in rows[0]]
    header = ["base", "px", *(f"{way}" for way in ways)]
    cells = [header]
    for row in rows:
        found = [row[way] for way in ways]
        shown = [
            f"{_size(one['gib'])}, " + (f"{one['card_gb']} GB" if one["card_gb"] else "over 80 GB")
            for one in found
        ]
        cells.append([row["base_precision"], str(row["side"]), *shown])
    return _aligned(cells)


def _streaming_lines(rows: list[dict[str, Any]], blocks: int) -> list[str]:
    """How many blocks a card has room for when the others are streamed."""
    cards = list(rows[0]["blocks_on_device"])
    cells = [["base", "px", *(f"{card} GB card" for card in cards)]]
    for row in rows:
        found = [row["blocks_on_device"][card] for card in cards]
        shown = ["-" if one is None else "all" if one == blocks else str(one) for one in found]
        cells.append([row["base_precision"], str(row["side"]), *shown])
    return [
        f"blocks of {blocks} that stay on the device, with full recomputation:",
        *_aligned(cells),
    ]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{1024 * gib:.2f} MiB"
