"""A whole training step: this trainer and the diffusers example's loop on the same transformer.

python benchmarks/train_step.py                        the full-size architecture, on a GPU
python benchmarks/train_step.py --layers 2 --heads 2 --px 128 256      a small one, on a CPU

Random weights are made on the device; latents and prompt embeddings are cached for both. Each way
and size runs in a process of its own. "model TFLOP/s" counts the products of one forward and
backward pass without recomputation, and its share of what a large matrix product reaches here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from common import machine, print_table
from example import example_loop
from loops import our_loop
from peft import LoraConfig
from random_model import BASES, HEAD, config_of, make_transformer
from synthetic import WIDTH, write_set

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image.scaled import PRODUCTS
from qwen_lora.posix import peak_rss_gib
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.attention import choose_attention, measure_on, use_attention
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.timesteps import TimestepSampling

SAMPLES = 16
WAYS = {
    "example": "diffusers example (PEFT, checkpointing)",
    "plain": "this project, diffusers' forward, full recompute",
    "full": "this project, full recompute",
    "selective": "this project, selective recompute",
    "none": "this project, nothing recomputed",
    "compiled-full": "this project, compiled, memory budget 0 (full recompute)",
    "compiled-some": "this project, compiled, some recompute",
    "compiled-offload": "this project, compiled, some recompute, activations in host memory",
    "compiled-none": "this project, compiled, nothing recomputed",
}


def make_loop(
    options: argparse.Namespace, shards: ShardSet, folder: Path, batch: int
) -> Callable[[int], None]:
    way, rank = options.way, options.rank
    dtype = getattr(torch, options.dtype)
    bf16 = dtype == torch.bfloat16
    config = config_of(options.heads, options.layers)
    if way == "example":
        accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not options.cuda)
        model = make_transformer(config, accelerator.device, dtype, tabled=False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        model.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
            )
        )
        model.enable_gradient_checkpointing()
        model.train()
        return example_loop(model, shards, batch, options.px, accelerator, dtype=dtype)
    accelerator = Accelerator(cpu=not options.cuda)
    family, compiled = family_by_name("qwen-image"), way.startswith("compiled-")
    tabled = bf16 and way != "plain"
    model = make_transformer(
        config,
        accelerator.device,
        dtype,
        tabled=tabled,
        base=options.base,
        products=options.products,
    )
    add_lora(model, LoraSpec.from_settings(Settings(rank=rank)), family, seed=0)
    recompute = "full" if way == "plain" else way.removeprefix("compiled-")
    offload = recompute == "offload"
    if recompute in ("some", "offload"):
        recompute = str(options.recompute or 3 * options.layers // 4)
    family.prepare_training(
        model,
        ForwardOptions(
            own=way != "plain",
            recompute=Recompute.parse(recompute),
            compiled=compiled,
            offload_activations=offload,
            activations_on_device=options.stay,
            blocks_on_device=options.on_device if offload else None,
        ),
    )
    model.train()
    tokens = (options.px // 16) ** 2 + options.tokens
    shape = (batch, options.heads, tokens, HEAD)
    measure_kernel = measure_on(accelerator.device, dtype, shape)
    chosen = choose_attention("auto", accelerator.device, measure_kernel)
    use_attention(chosen)
    print(f"attention: {chosen or 'torch'}", file=sys.stderr)
    torch.cuda.reset_peak_memory_stats() if options.cuda else None
    sampling = TimestepSampling(compute_dtype=dtype)
    return our_loop(model, shards, batch, folder, accelerator, sampling)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds a step and peak memory of one way at one size."""
    batch = options.batch or max(1, options.token_budget // (options.px // 16) ** 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder / "set", max(SAMPLES, batch), options.px, options.tokens)
        with ShardSet.open(folder / "set") as shards, contextlib.ExitStack() as quiet:
            run = make_loop(options, shards, folder, batch)
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            run(options.warm_up)
            taken = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                run(options.steps)
                if options.cuda:
                    torch.cuda.synchronize()
                taken.append((time.perf_counter() - start) / options.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.cuda else peak_rss_gib() or 0.0
    return {
        "seconds": statistics.median(taken),
        "least": min(taken),
        "most": max(taken),
        "peak": peak,
        "batch": batch,
    }


def step_tflop(options: argparse.Namespace, batch: int) -> float:
    """Matrix products of a forward and backward pass: linears once each (their weights are frozen),
    attention's backward two and a half times its forward."""
    width, layers = options.heads * HEAD, options.layers
    image, text = (options.px // 16) ** 2, options.tokens
    linears = 2 * (image + text) * 12 * width**2 * layers
    outside = 2 * (image * 2 * 64 + text * WIDTH) * width
    attention = 4 * (image + text) ** 2 * width * layers
    return batch * (2 * (linears + outside) + 3.5 * attention) / 1e12


def matmul_tflops(options: argparse.Namespace) -> float:
    """What one large product reaches here, the median of ten."""
    device = torch.device("cuda" if options.cuda else "cpu")
    side = 8192 if options.cuda else 1024
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, options.dtype)) for _ in "ab")
    taken = []
    for _ in range(11):
        start = time.perf_counter()
        torch.mm(a, b)
        if options.cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(taken[1:]) / 1e12


def table(options: argparse.Namespace) -> None:
    print(machine())
    if options.cuda:
        print(f"device: {torch.cuda.get_device_name()}")
    best = matmul_tflops(options)
    print(f"matrix product in {options.dtype}: {best:.4g} TFLOP/s")
    for px in options.px_list:
        rows, base = [], None
        for way in options.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--one-px", str(px)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            label = WAYS[way]
            if done.returncode:
                rows.append([label, "failed (out of memory?)", *[""] * 6])
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            base = base or found
            seconds, batch = found["seconds"], int(found["batch"])
            options.px = px
            rate = step_tflop(options, batch) / seconds
            rows.append(
                [
                    label,
                    f"{seconds:.3f}",
                    f"{found['least']:.3f}-{found['most']:.3f}",
                    f"{batch / seconds:.2f}",
                    f"{base['seconds'] / base['batch'] * batch / seconds:.2f}",
                    f"{found['peak']:.2f}",
                    f"{rate:.4g}",
                    f"{100 * rate / best:.0f} %",
                ]
            )
        print_table(
            f"{px} px, {options.tokens} text tokens, {options.layers} layers of {options.heads} "
            f"heads, rank {options.rank}, {options.dtype}, base {options.base}, products "
            f"{options.products}",
            ["", "s/step", "min-max", "samples/s", "x first", "peak GiB", "TFLOP/s", "of peak"],
            rows,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--px", type=int, nargs="+", default=[512, 768, 1024, 1328], dest="px_list")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="0: as many as --token-budget holds")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--base", default="bf16", choices=BASES, help="of this project")
    parser.add_argument("--products", default="none", choices=PRODUCTS, help="with --base")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recompute", type=int, help="blocks, of ways with some recompute")
    parser.add_argument("--stay", type=int, default=0, help="blocks whose activations stay")
    parser.add_argument("--on-device", type=int, help="blocks, the others are streamed")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--one-px", type=int, dest="px", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cuda = torch.cuda.is_available()
    if options.way:
        print(json.dumps(measure(options)))
    else:
        table(options)


if __name__ == "__main__":
    main()
