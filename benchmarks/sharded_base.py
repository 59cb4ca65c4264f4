"""`shard_base`: the frozen base whole on every process, and spread over them with FSDP2.

torchrun --nproc-per-node 2 benchmarks/sharded_base.py      the full-size architecture, on two GPUs
python benchmarks/sharded_base.py                           on one: what gathering costs by itself
python benchmarks/sharded_base.py --layers 2 --heads 2 --px 128        a small one, on a CPU
python benchmarks/sharded_base.py --base fp8 --products forward        weights held in 8 bits

A step is one micro-batch on each process, forward and backward with full recomputation, without the
optimizer. Weights are random, the same for both ways; the last column says whether the loss and all
LoRA gradients of one more step, with deterministic kernels, have the same bits.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
from common import machine, print_table
from random_model import BASES, config_of, make_transformer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image.scaled import PRODUCTS
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss
from qwen_lora.train.sharding import FSDP

GIB = 1 << 30
Found = dict[str, Any]


def measure(options: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None) -> Found:
    family = family_by_name("qwen-image")
    config, dtype = config_of(options.heads, options.layers), getattr(torch, options.dtype)
    how: Found = {"base": options.base, "products": options.products}
    model = make_transformer(config, device, dtype, mesh=mesh, **how)
    spec = LoraSpec.from_settings(Settings(rank=options.rank, lora_init="orthogonal"))
    loras = add_lora(model, spec, family, seed=0)
    family.prepare_training(model, ForwardOptions(recompute=Recompute("full")))
    model.train()
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    generator = torch.Generator().manual_seed(1)
    size = (1, 16, options.px // 8, options.px // 8)
    latents, noise = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    text = torch.randn(options.tokens, 3584, generator=generator).to(device)
    mask = torch.ones(options.tokens, dtype=torch.bool)

    def step() -> torch.Tensor:
        for _, parameter in loras:
            parameter.grad = None
        sigmas = torch.tensor([0.5])
        loss = flow_matching_loss(
            model, latents, [text], [mask], noise, sigmas, weighting_scheme="none", family=family
        ).sum()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.detach()

    for _ in range(options.warm_up):
        step()
    taken = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    torch.use_deterministic_algorithms(True, warn_only=True)
    loss = step()
    torch.use_deterministic_algorithms(False)
    gradients = [parameter.grad.cpu() for _, parameter in loras if parameter.grad is not None]
    return {
        "seconds": statistics.median(taken),
        "peak": peak,
        "held": held,
        "numbers": [loss.cpu(), *gradients],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--base", choices=BASES[:-1], default="bf16")
    parser.add_argument("--products", choices=PRODUCTS, default="none")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        dist.init_process_group(
            "nccl" if cuda else "gloo", rank=0, world_size=1, store=dist.HashStore()
        )
    else:
        dist.init_process_group("nccl" if cuda else "gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=(FSDP,))
    whole = measure(options, device, None)
    spread = measure(options, device, mesh)
    pairs = zip(whole["numbers"], spread["numbers"], strict=True)
    same = "yes" if all(torch.equal(one, other) for one, other in pairs) else "NO"
    rows = [
        [
            name,
            f"{found['seconds']:.3f}",
            f"{found['held'] / GIB:.2f}" if cuda else "-",
            f"{found['peak'] / GIB:.2f}" if cuda else "-",
            bits,
        ]
        for name, found, bits in (
            ("this project, whole", whole, "-"),
            (f"this project, spread over {world}", spread, same),
        )
    ]
    if rank == 0:
        print(machine())
        held = f"{options.dtype}, base {options.base}, products {options.products}"
        title = f"{options.px} px, {options.layers} blocks, {held}, {world} process(es)"
        header = ["base", "s/step", "held GiB", "peak GiB", "same bits"]
        print_table(title, header, rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
