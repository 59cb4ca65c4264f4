# ruff: noqa: TID253
"""At a run's start: what to compute anew and what to stream, from the memory that the GPU has
free."""

from __future__ import annotations

import os
import sys

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import Recompute
from qwen_lora.models import ModelFolder
from qwen_lora.posix import free_memory
from qwen_lora.train.checkpoint import RunFacts
from qwen_lora.train.cost.choice import (
    AUTO,
    GIB,
    Choice,
    choose,
    fixed_way,
    too_small,
    usable_bytes,
)
from qwen_lora.train.cost.copies import measure_copies
from qwen_lora.train.cost.duration import find_pace
from qwen_lora.train.cost.shapes import bucket_loads, largest_load
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.ways import Way
from qwen_lora.train.plan import BatchRule
from qwen_lora.train.sharding import shards_of_base
from qwen_lora.train.table import PlanTable
from qwen_lora.train.transformer import choose_dtype


def settle_way(
    settings: Settings,
    model: ModelFolder,
    table: PlanTable,
    rule: BatchRule,
    device: torch.device,
    recorded: RunFacts | None = None,
    quiet: bool = False,
    world: int = 1,
    memory: tuple[int, int] | None = None,
) -> Way:
    """Call before the model is loaded. The choice may differ between ranks and between the starts
    of a run: it changes no bit of the result, but where blocks are compiled, and there the
    recorded one is kept. memory: free and total bytes, of the GPU if None; without a GPU nothing
    is counted."""
    if recorded and recorded.recompute:
        settings = _as_recorded(settings, recorded.recompute, recorded.blocks_on_device)
    if memory is None:
        if device.type != "cuda":
            blocks = model.family.block_count(model.config("transformer"))
            return fixed_way(settings, blocks) or Way(Recompute("full"))
        torch.cuda.empty_cache()  # what measuring attention has left counts as free
        memory = torch.cuda.mem_get_info(device)
    free, total = memory
    loads = bucket_loads(table, rule)
    parts = shards_of_base(settings, world)
    step_model = StepModel(model, settings, choose_dtype(settings, device), parts)
    load = largest_load(loads, model.family)
    shape = load.largest(model.family)
    usable, pace = usable_bytes(total, free), None
    if device.type == "cuda" and step_model.budgeted:  # else FLOPs are enough
        pace = find_pace(step_model, shape, usable)
    choice = choose(step_model, shape, usable, pace)
    if not quiet:
        height, width = load.bucket
        print(
            f"{choice.way}: predicted peak {choice.cost.peak / GIB:.2f} GiB for "
            f"{load.batch} x {height} x {width} px with {load.longest} text tokens, "
            f"{free / GIB:.2f} GiB are free",
            file=sys.stderr,
        )
        if choice.cost.host:
            print(_streaming(choice, device), file=sys.stderr)
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            if (free_host := free_memory()) is not None and here * choice.cost.host > free_host:
                print(_short_host(here * choice.cost.host, free_host), file=sys.stderr)
        if choice.missing:
            print(f"warning: {too_small(step_model, shape, choice)}", file=sys.stderr)
    return choice.way


def _short_host(wanted: int, free: int) -> str:
    return (
        f"warning: streamed blocks take {wanted / GIB:.2f} GiB of host memory and "
        f"{free / GIB:.2f} GiB are free: the system may end this run. More blocks_on_device, fewer "
        "processes on this machine, or a base_precision of fewer bits takes less"
    )


def _as_recorded(settings: Settings, recompute: str, on_device: int | None) -> Settings:
    update = {}
    if settings.recompute == AUTO:
        update["recompute"] = recompute
    if settings.blocks_on_device == AUTO:
        update["blocks_on_device"] = "all" if on_device is None else str(on_device)
    return settings.model_copy(update=update)


def _streaming(choice: Choice, device: torch.device) -> str:
    cost, rate = choice.cost, measure_copies(device)
    seconds = f", {cost.traffic / rate:.2f} s at {rate / 1e9:.1f} GB/s (measured)" if rate else ""
    return (
        f"the other blocks lie in {cost.host / GIB:.2f} GiB of host memory; a micro-batch copies "
        f"{cost.traffic / GIB:.2f} GiB to the device{seconds}"
    )
