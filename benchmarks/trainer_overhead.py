"""What the trainer costs besides the model: this project's loop and the diffusers example's.

python benchmarks/trainer_overhead.py [--px N] [--batch N] [--steps N] [--repeats N]

Both drive a null transformer, which returns its input times one trainable number, over the same
latents and prompt embeddings. Ours reads, verifies and decodes its shards in every step, as it does
in training; the example keeps latents and embeddings in memory. The example's loop is written here
from what diffusers' `train_dreambooth_lora_qwen_image.py` does per step with --cache_latents and
captions of its own, on one device; its data loader also stacks the decoded images of the batch,
which it goes on doing with cached latents, so it stands here with and without that.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import machine, median_ms, print_table, spread, take_turns
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from synthetic import CHANNELS, SCALE, write_set
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.checkpoint import TrainState
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.loop import Loop, LoopParts
from qwen_lora.train.metrics import MetricsFile
from qwen_lora.train.plan import BatchRule, PlanTable
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.step import SampleLosses, Stepper
from qwen_lora.train.timesteps import TimestepSampling
from qwen_lora.train.trackers import Trackers

SAMPLES, TOKENS = 32, 128


class NullTransformer(torch.nn.Module):
    """Costs one multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
        return (hidden_states * self.scale,)


# ---- this project --------------------------------------------------------------------------------


def our_loop(shards: ShardSet, batch: int, folder: Path, accelerator: Accelerator, ahead: int):
    """A function that trains the given number of steps with the real loop."""
    ranks = Ranks(accelerator)
    model = NullTransformer()
    losses = SampleLosses(model, family_by_name("qwen-image"), "none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    settings = Settings(train_batch_size=batch, read_ahead=ahead, output_dir=folder)
    rule = BatchRule(train_batch_size=batch, micro_batches_per_step=1, seed=0)
    table = PlanTable.from_sets([shards])
    loader = BatchLoader([shards], table, rule, TimestepSampling(), read_ahead=ahead)
    schedule = get_scheduler("constant", optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parameters = list(model.parameters())
    stepper = Stepper(ranks, losses, parameters, optimizer, schedule, scaler, settings)

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


# ---- the diffusers example -----------------------------------------------------------------------


class Images(torch.utils.data.Dataset):
    """Prompts and, as the example keeps them, decoded images."""

    def __init__(self, count: int, px: int, with_pixels: bool) -> None:
        side = px if with_pixels else 1
        self.pixels = [torch.zeros(3, side, side) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": self.pixels[index], "prompt": f"caption {index}"}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = torch.stack([item["pixels"] for item in items])
    return {
        "pixel_values": pixels.unsqueeze(2).to(memory_format=torch.contiguous_format).float(),
        "prompts": [item["prompt"] for item in items],
    }


def cached_batches(shards: ShardSet, batch: int) -> tuple[list[Any], list[torch.Tensor]]:
    """The posteriors and prompt embeddings of each batch, held in memory as the example does."""
    records = [shards.read(row).tensors for row in range(len(shards))]
    latents, embeds = [], []
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        mean = torch.stack([one["latents"].float() for one in some]).unsqueeze(2)
        moments = torch.cat([mean, torch.full_like(mean, -20.0)], dim=1)  # [B, 2C, 1, h, w]
        latents.append(DiagonalGaussianDistribution(moments))
        embeds.append(torch.stack([one["prompt_embeds.0"].float() for one in some]))
    return latents, embeds


def example_loop(shards: ShardSet, batch: int, px: int, accelerator: Accelerator, pixels: bool):
    """A function that trains the given number of steps the example's way."""
    latents, embeds = cached_batches(shards, batch)
    model = NullTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = torch.utils.data.DataLoader(
        Images(len(shards), px, pixels), batch_size=batch, shuffle=False, collate_fn=collate
    )
    schedule = get_scheduler("constant", optimizer=optimizer)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    noise_scheduler = copy.deepcopy(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    shape = (1, CHANNELS, 1, 1, 1)
    mean, inverse_std = torch.zeros(shape), torch.ones(shape)

    def sigmas_of(timesteps: torch.Tensor, dims: int) -> torch.Tensor:
        known = noise_scheduler.timesteps
        where = [(known == timestep).nonzero().item() for timestep in timesteps]
        return noise_scheduler.sigmas[where].flatten().view(-1, *[1] * (dims - 1))

    def loss_of(step: int) -> torch.Tensor:
        clean = (latents[step].sample() - mean) * inverse_std
        noise = torch.randn_like(clean)
        u = compute_density_for_timestep_sampling(
            weighting_scheme="none", batch_size=len(clean), logit_mean=0.0, logit_std=1.0
        )
        chosen = (u * noise_scheduler.config.num_train_timesteps).long()
        timesteps = noise_scheduler.timesteps[chosen]
        sigmas = sigmas_of(timesteps, clean.ndim)
        noised = ((1.0 - sigmas) * clean + sigmas * noise).permute(0, 2, 1, 3, 4)
        height, width = clean.shape[-2:]
        predicted = model(
            hidden_states=QwenImagePipeline._pack_latents(
                noised, len(clean), CHANNELS, height, width
            ),
            encoder_hidden_states=embeds[step],
            encoder_hidden_states_mask=None,
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * len(clean),
            return_dict=False,
        )[0]
        predicted = QwenImagePipeline._unpack_latents(
            predicted, height * SCALE, width * SCALE, SCALE
        )
        weight = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
        error = weight.float() * (predicted.float() - (noise - clean).float()) ** 2
        return error.reshape(len(clean), -1).mean(1).mean()

    def run(steps: int) -> None:
        done = 0
        bar = tqdm(total=steps, file=io.StringIO())
        while done < steps:
            for step, _batch in enumerate(loader):
                with accelerator.accumulate([model]):
                    loss = loss_of(step)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                bar.update(1)
                done += 1
                logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0]}
                bar.set_postfix(**logs)
                accelerator.log(logs, step=done)
                if done == steps:
                    break

    return run


# ---- measuring -----------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts dispatched operators, and reads of a value by Python (each waits for a GPU)."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def counts(run: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Operators and value reads a step in the main thread, which is the one that feeds a GPU."""
    with Counter() as counter:
        run(steps)
    return counter.operators / steps, counter.reads / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    write_set(folder / "set", SAMPLES, options.px, TOKENS)
    accelerator = Accelerator(cpu=True)
    with ShardSet.open(folder / "set") as shards:
        batch, px = options.batch, options.px
        runs = {
            "this project": our_loop(shards, batch, folder, accelerator, 4),
            "this project, no read-ahead": our_loop(shards, batch, folder, accelerator, 0),
            "example": example_loop(shards, batch, px, accelerator, pixels=True),
            "example without its images": example_loop(shards, batch, px, accelerator, False),
        }
        with contextlib.redirect_stderr(io.StringIO()):
            ways = {name: (lambda run=run: run(options.steps)) for name, run in runs.items()}
            taken = take_turns(ways, options.repeats)
            counted = {name: counts(run, options.steps) for name, run in runs.items()}
    base = median_ms([one.wall for one in taken["example"]], options.steps)
    rows = []
    for name, times in taken.items():
        wall, cpu = [one.wall for one in times], [one.cpu for one in times]
        median = median_ms(wall, options.steps)
        operators, reads = counted[name]
        rows.append(
            [
                name,
                f"{median:.2f}",
                spread(wall, options.steps),
                f"{median_ms(cpu, options.steps):.2f}",
                f"{median / base:.2f}",
                f"{operators:.0f}",
                f"{reads:.1f}",
            ]
        )
    print_table(
        f"null transformer, {px} px, batch {batch}, {options.steps} steps, {options.repeats} "
        "repeats in turn, ms a step",
        ["", "median", "min-max", "cpu", "vs example", "operators", "value reads"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
