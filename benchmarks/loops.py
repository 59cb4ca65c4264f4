"""This project's training loop over any model, to be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.checkpoint import TrainState
from qwen_lora.train.data import BatchLoader, LoadedBatch
from qwen_lora.train.loop import Loop, LoopParts
from qwen_lora.train.metrics import MetricsFile
from qwen_lora.train.optimizer import build_optimizer
from qwen_lora.train.plan import BatchRule, MicroBatch, PlanTable
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.step import SampleLosses, Stepper
from qwen_lora.train.timesteps import TimestepSampling
from qwen_lora.train.trackers import Trackers


class InMemory(BatchLoader):
    """Keeps each batch after its first use, noise and all, as the example keeps what it trains on:
    what is left is what a step costs without its data."""

    def load(self, micro_batch: MicroBatch, epoch: int) -> LoadedBatch:
        kept: dict[tuple[int, ...], LoadedBatch] = self.__dict__.setdefault("kept", {})
        rows = tuple(visit.row for visit in micro_batch.visits)
        if rows not in kept:
            kept[rows] = super().load(micro_batch, epoch)
        return kept[rows]


def our_loop(
    model: torch.nn.Module,
    shards: ShardSet,
    batch: int,
    folder: Path,
    accelerator: Accelerator,
    sampling: TimestepSampling,
    *,
    read_ahead: int = 4,
    in_memory: bool = False,
) -> Callable[[int], None]:
    """A function that trains the given number of steps with this project's own loop. in_memory:
    each batch is read once."""
    ranks = Ranks(accelerator)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = [parameter for _, parameter in named]
    family = family_by_name("qwen-image")
    losses = SampleLosses(model, family, "none")
    settings = Settings(train_batch_size=batch, read_ahead=read_ahead, output_dir=folder)
    optimizer, flat = build_optimizer(named, settings)
    if flat is not None:
        flat.make_state(optimizer)
        if hasattr(model, "own_forward"):
            flat.cast_together(model)
    rule = BatchRule(train_batch_size=batch, micro_batches_per_step=1, seed=0)
    table = PlanTable.from_sets([shards])
    on_gpu = accelerator.device.type == "cuda"
    loader = (InMemory if in_memory else BatchLoader)(
        [shards],
        table,
        rule,
        sampling,
        read_ahead=read_ahead,
        pin_memory=on_gpu,
        tokens_for=family,
    )
    schedule = get_scheduler("constant", optimizer)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=False)
    stepper = Stepper(ranks, losses, trained, optimizer, schedule, scaler, settings, flat=flat)

    def run(steps: int) -> None:
        metrics = MetricsFile(folder / "metrics.jsonl")
        metrics.clear()
        parts = LoopParts(
            settings.model_copy(update={"max_train_steps": steps}),
            ranks,
            stepper,
            loader,
            None,
            metrics,
            Trackers(accelerator, settings),
            lambda state: None,
        )
        Loop(parts, TrainState()).run()

    return run
