"""Predicted and measured memory of a training step, and its time, for bases and ways to run.

python benchmarks/memory.py                         the full-size architecture, on a GPU
python benchmarks/memory.py --bases bf16 fp8:both nf4 --ways full compiled+45 --px 1024
python benchmarks/memory.py --width 1 --blocks 3 --px 64 --text 4     a small one, on a CPU

A base is a precision, with the kind of its products behind a colon. A way is what is recomputed
(full, selective, none or a number of blocks), "compiled", "offload" for activations in host memory,
"stay15" for 15 blocks whose do not leave, and "on40" for 40 blocks on the device, joined by "+".
Random weights of Qwen-Image's shapes are made on the device; no model is needed. On a GPU the
measured peak is what torch.cuda.max_memory_allocated says of forward and backward passes; on a CPU
the storages of a pass are counted, which is slow at real sizes. What the optimizer keeps is not
allocated and not in either column. Rows come as they are measured; the table repeats them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from random_model import BASES, config_of, make_transformer
from torch import _dynamo

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image.scaled import PRODUCTS
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.train.attention import choose_attention, measure_on, use_attention
from qwen_lora.train.cost.choice import GIB
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.trace import trace
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss

WARM_UP, STEPS = 2, 4
WAYS = ("full", "none", "compiled+full", "compiled+45", "compiled+none", "on30")


def model_folder(folder: Path, heads: int, blocks: int) -> ModelFolder:
    (folder / "transformer").mkdir()
    config = json.dumps(config_of(heads, blocks))
    (folder / "transformer" / "config.json").write_text(config)
    return resolve_model(str(folder), ("transformer",), weights=False)


@dataclass(frozen=True)
class Way:
    name: str
    recompute: Recompute
    compiled: bool
    offload: bool
    stay: int  # blocks whose activations do not leave
    on_device: int | None  # blocks

    @classmethod
    def parse(cls, name: str) -> Way:
        words = name.split("+")
        resident = [int(word[2:]) for word in words if word[:2] == "on"]
        stay = [int(word[4:]) for word in words if word[:4] == "stay"]
        kind = [word for word in words if word.isdecimal() or word in ("full", "selective", "none")]
        return cls(
            name,
            Recompute.parse(kind[0] if kind else "full"),
            "compiled" in words,
            "offload" in words,
            stay[0] if stay else 0,
            resident[0] if resident else None,
        )

    def settings(self, options: argparse.Namespace, base: str) -> Settings:
        precision, _, products = base.partition(":")
        return Settings(
            rank=options.rank,
            lora_targets=options.targets,
            base_precision=precision,
            low_precision_products=products or "none",
            compile_blocks=self.compiled,
            offload_activations=self.offload,
        )


class Passes:
    """One batch, and the losses of it."""

    def __init__(self, model: StepModel, transformer: torch.nn.Module, shape: Shape) -> None:
        self.model, self.transformer, self.shape = model, transformer, shape
        device = next(transformer.parameters()).device
        size = (shape.batch, 16, *shape.latent_size)
        self.latents, self.noise = (torch.randn(size, device=device) for _ in range(2))
        self.texts = [
            torch.randn(count, 3584, device=device, dtype=torch.bfloat16)
            for count in shape.text_tokens
        ]
        self.masks = [torch.ones(count, dtype=torch.bool) for count in shape.text_tokens]

    def losses(self) -> torch.Tensor:
        return flow_matching_loss(
            self.transformer,
            self.latents,
            self.texts,
            self.masks,
            self.noise,
            torch.full((self.shape.batch,), 0.5),
            family=self.model.family,
        )

    def measure(self, steps: int = STEPS) -> tuple[int | None, float]:
        """Bytes at the peak, those of the batch and the weights included, and the median seconds of
        a pass; None where memory has run out."""
        if self.latents.device.type != "cuda":
            started = time.perf_counter()
            found = trace(self.losses, "cpu").peak
            tensors = [*self.transformer.parameters(), *self.transformer.buffers()]
            gradients = [p.grad for p in self.transformer.parameters() if p.grad is not None]
            held = [*tensors, *gradients, self.latents, self.noise, *self.texts]
            bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in held)
            return found + bytes_held, time.perf_counter() - started
        taken = []
        try:
            for number in range(WARM_UP + steps):
                if number == WARM_UP:
                    torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                started = time.perf_counter()
                self.losses().sum().backward()
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
        except torch.OutOfMemoryError:
            return None, 0.0
        return torch.cuda.max_memory_allocated(), statistics.median(taken[WARM_UP:])


def make_model(model: StepModel, device: torch.device) -> torch.nn.Module:
    settings = model.settings
    transformer = make_transformer(
        model.model.config("transformer"),
        device,
        model.dtype,
        base=settings.base_precision,
        products=settings.low_precision_products,
    )
    for _, parameter in add_lora(transformer, LoraSpec.from_settings(settings), model.family, 0):
        parameter.grad = torch.zeros_like(parameter)
    trained: torch.nn.Module = transformer.train()
    return trained


def prepare(model: StepModel, transformer: torch.nn.Module, way: Way) -> None:
    """A block that has left does not come back: ways that stream more come last."""
    _dynamo.reset()
    how = ForwardOptions(
        recompute=way.recompute,
        compiled=way.compiled,
        offload_activations=way.offload,
        activations_on_device=way.stay,
        blocks_on_device=way.on_device,
    )
    model.family.prepare_training(transformer, how)


def make_passes(
    model: StepModel, transformer: torch.nn.Module, px: int, options: argparse.Namespace
) -> Passes:
    """With the fastest attention."""
    shape = Shape((px // 8, px // 8), (options.text,) * options.batch)
    passes = Passes(model, transformer, shape)
    device, tokens = passes.latents.device, model.family.image_tokens(shape.latent_size)
    heads = (options.batch, options.width, tokens + options.text, 128)
    use_attention(choose_attention("auto", device, measure_on(device, model.dtype, heads)))
    gc.collect()
    torch.cuda.empty_cache()
    return passes


def measure(
    folder: ModelFolder, base: str, ways: list[Way], options: argparse.Namespace
) -> list[list[object]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[list[object]] = []
    transformer = None
    for way in sorted(ways, key=lambda way: -(way.on_device or options.blocks)):
        model = StepModel(folder, way.settings(options, base), torch.bfloat16)
        transformer = transformer or make_model(model, device)
        prepare(model, transformer, way)
        for px in options.px:
            rows.append([base, *one(model, transformer, way, px, options)])
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    return rows


def one(
    model: StepModel,
    transformer: Any,
    way: Way,
    px: int,
    options: argparse.Namespace,
) -> list[object]:
    """A row of the table: one size, one way."""
    passes = make_passes(model, transformer, px, options)
    found, seconds = passes.measure()
    cost = model.cost(passes.shape, way.recompute, way.on_device, way.stay)
    # The meta device has not run the loop's optimizer, and neither has this.
    predicted = cost.peak - cost.lora + 8 * model.lora_parameters
    known = "" if found is None else f"{100 * (predicted / found - 1):+.1f} %"
    rate = cost.flops / seconds / 1e12 if seconds else 0.0
    return [
        way.name,
        px,
        f"{predicted / GIB:.3f}",
        "out of memory" if found is None else f"{found / GIB:.3f}",
        known,
        f"{seconds:.3f}",
        f"{rate:.3g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--px", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--bases", nargs="+", default=["bf16", "fp8", "fp8:both", "int8", "nf4"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--text", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--width", type=int, default=24, help="heads of 128")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention")
    options = parser.parse_args()
    for base in options.bases:
        precision, _, products = base.partition(":")
        if precision not in BASES or (products or "none") not in PRODUCTS:
            parser.error(f"--bases: {base!r} is none of {', '.join(BASES)} with :forward or :both")
    print(machine())
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    ways = [Way.parse(name) for name in options.ways]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name), options.width, options.blocks)
        for base in options.bases:
            rows += measure(folder, base, ways, options)
            gc.collect()
    print_table(
        f"this project, {options.blocks} blocks, {options.width} heads, {options.batch} x "
        f"{options.text} text tokens, LoRA rank {options.rank} on {options.targets}",
        ["base", "way", "px", "predicted GiB", "measured GiB", "error", "s", "TFLOP/s"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
