"""Blocks streamed from host memory: predicted and measured memory, seconds and copies of a step.

python benchmarks/streaming.py [--on-device all 40 20 0] [--px N] [--text N] [--batch N]
                               [--blocks N] [--width HEADS] [--rank N] [--compile] [--offload]

Random weights of Qwen-Image's shapes (without the modulation layers, for which random rows stand)
are made block by block; a streamed block goes to host memory at once, and fewer blocks on the
device come out of the same model. "predicted s" is what `plan` computes for blocks that take as
long as those of the first row (on a card that holds it all; or else their FLOPs at the rates of
matrix products) and copies at the rate measured here. "same bits" compares loss and gradients with
the first row's, with deterministic kernels. On a CPU take --width 1 --blocks 5 --px 32 --text 4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from common import machine, print_table
from memory import Passes, model_folder
from random_model import BASES, make_transformer

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image.scaled import PRODUCTS
from qwen_lora.families.streaming import BlockStreamer
from qwen_lora.train.attention import choose_attention, measure_on, use_attention
from qwen_lora.train.cost.choice import GIB
from qwen_lora.train.cost.copies import (
    BESIDE_COPIES,
    Streamed,
    copying_seconds,
    measure_copies,
)
from qwen_lora.train.cost.rates import find_rates
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import Cost, StepModel
from qwen_lora.train.cost.trace import trace
from qwen_lora.train.lora import LoraSpec, add_lora

WARM_UP = 2


def make_model(model: StepModel, on_device: int, device: torch.device) -> Any:
    """With a LoRA that is not zero."""
    transformer = make_transformer(
        model.model.config("transformer"),
        device,
        model.dtype,
        base=model.settings.base_precision,
        products=model.settings.low_precision_products,
        on_device=on_device,
    )
    spec = LoraSpec.from_settings(model.settings)
    for _, parameter in add_lora(transformer, spec, model.family, 0):
        torch.nn.init.normal_(parameter, 0, 0.02)
        parameter.grad = torch.zeros_like(parameter)
    return transformer.train()


class Measured:
    """One number of blocks on the device."""

    def __init__(self, passes: Passes, steps: int, attention: str | None) -> None:
        transformer = passes.transformer
        self.streamer: BlockStreamer = transformer.streamer  # type: ignore[assignment]
        self.on_gpu = self.streamer.device.type == "cuda"
        use_attention("flash")  # cuDNN's gradients differ from pass to pass
        self.numbers = self._numbers(passes)
        use_attention(attention)
        for _ in range(WARM_UP):
            passes.losses().sum().backward()
        self._wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before, started = self.streamer.copied_bytes, time.perf_counter()
        for _ in range(steps):
            passes.losses().sum().backward()
        self._wait()
        self.seconds = (time.perf_counter() - started) / steps
        self.copied = (self.streamer.copied_bytes - before) // steps
        self.forward = self._forward(passes, steps)
        self.peak = torch.cuda.max_memory_allocated() if self.on_gpu else self._on_cpu(passes)

    def _forward(self, passes: Passes, steps: int) -> float:
        """The share of a step that is its forward pass."""
        shares = []
        for _ in range(steps):
            started = time.perf_counter()
            losses = passes.losses().sum()
            self._wait()
            middle = time.perf_counter()
            losses.backward()
            self._wait()
            shares.append((middle - started) / (time.perf_counter() - started))
        return statistics.median(shares)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _numbers(self, passes: Passes) -> list[torch.Tensor]:
        """Loss and gradients of one pass, on the host."""
        parameters = [p for p in passes.transformer.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        torch.use_deterministic_algorithms(True)
        losses = passes.losses()
        losses.sum().backward()
        torch.use_deterministic_algorithms(False)
        return [losses.detach().cpu(), *(p.grad.cpu() for p in parameters if p.grad is not None)]

    def _on_cpu(self, passes: Passes) -> int:
        """The storages of a pass and of what is held."""
        found = trace(passes.losses, "cpu", warm=True).peak
        held = [*passes.transformer.parameters(), passes.latents, passes.noise, *passes.texts]
        held += [p.grad for p in passes.transformer.parameters() if p.grad is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return found + sum(storages.values())


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        return "yes"
    pairs = zip(ours[1:], theirs[1:], strict=True)
    apart = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return f"no, {float(apart / torch.stack([b.norm() for b in theirs[1:]]).norm()):.1e}"


def measure(model: StepModel, options: argparse.Namespace, device: torch.device) -> None:
    shape = Shape((options.px // 8, options.px // 8), (options.text,) * options.batch)
    wanted = [model.blocks if n == "all" else int(n) for n in options.on_device]
    copies = measure_copies(device)
    low = model.cost(shape, Recompute("full")).low_flops
    rates = find_rates(model.family, options.base if low else None)
    if copies:
        each = [rate.flops for rate in (rates.full, rates.low) if rate]
        print(
            f"copies to the device: {copies / 1e9:.1f} GB/s, products: "
            f"{', in 8 bits '.join(f'{rate / 1e12:.0f}' for rate in each)} TFLOP/s"
        )
    tokens = model.family.image_tokens(shape.latent_size) + options.text
    heads = (options.batch, options.width, tokens, 128)
    chosen = choose_attention("auto", device, measure_on(device, model.dtype, heads))
    use_attention(chosen)
    started = time.perf_counter()
    transformer = make_model(model, max(wanted), device)
    print(f"attention {chosen or 'torch'}; model made in {time.perf_counter() - started:.0f} s")
    passes = Passes(model, transformer, shape)
    rows: list[list[object]] = []
    first: Measured | None = None
    for on_device in sorted(wanted, reverse=True):
        how = ForwardOptions(
            recompute=Recompute("full"),
            compiled=options.compile,
            blocks_on_device=on_device,
            offload_activations=options.offload,
        )
        model.family.prepare_training(transformer, how)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        cost = model.cost(shape, Recompute("full"), on_device)
        found = Measured(passes, options.steps, chosen)
        first = first or found
        if not rows and on_device == model.blocks:
            pace = found.seconds * found.forward, found.seconds * (1 - found.forward)
        elif not rows:  # the device does not hold all blocks: by arithmetic
            pace = (
                rates.seconds(cost.forward_flops, cost.forward_low),
                rates.seconds(cost.backward_flops, cost.backward_low),
            )
        rows.append(row(model, on_device, cost, found, first, pace, copies))
    columns = "on device,predicted GiB,measured GiB,error,host GiB,s/step,predicted s,GiB copied"
    print_table(
        f"this project, {model.blocks} blocks, {options.width} heads, {options.batch} x "
        f"{options.px} px with {options.text} text tokens, {options.base}, products "
        f"{options.products}, full recompute{', compiled' * options.compile}"
        f"{', activations offloaded' * options.offload}",
        [*columns.split(","), "predicted", "GB/s", "same bits"],
        rows,
    )


def row(
    model: StepModel,
    on_device: int,
    cost: Cost,
    found: Measured,
    first: Measured,
    pace: tuple[float, float],
    copies: float | None,
) -> list[object]:
    # What the optimizer keeps is not allocated here.
    predicted = cost.peak - cost.lora + 8 * model.lora_parameters
    seconds = sum(pace)
    if copies:
        streamed = Streamed(on_device, model.block_bytes / copies, BESIDE_COPIES)
        seconds = copying_seconds(model.blocks, *pace, streamed)
    return [
        on_device,
        f"{predicted / GIB:.3f}",
        f"{found.peak / GIB:.3f}",
        f"{100 * (predicted / found.peak - 1):+.1f} %",
        f"{found.streamer.host_bytes / GIB:.2f}",
        f"{found.seconds:.3f}",
        f"{seconds:.3f}",
        f"{found.copied / GIB:.3f}",
        f"{cost.traffic / GIB:.3f}",
        f"{found.copied / found.seconds / 1e9:.1f}",
        same(found.numbers, first.numbers),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on-device", nargs="+", default=["all", "40", "20", "0"])
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--text", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--width", type=int, default=24, help="heads of 128")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="bf16", choices=BASES)
    parser.add_argument("--products", default="none", choices=PRODUCTS, help="with --base")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--offload", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    print(machine())
    if on_gpu:
        print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    settings = Settings(
        rank=options.rank,
        base_precision=options.base,
        low_precision_products=options.products,
        offload_activations=options.offload,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name), options.width, options.blocks)
        model = StepModel(folder, settings, torch.bfloat16)
        measure(model, options, torch.device("cuda" if on_gpu else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
