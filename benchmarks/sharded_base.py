"""`shard_base`: the frozen base whole on every process, and spread over them with FSDP2.

torchrun --nproc-per-node 2 benchmarks/sharded_base.py      the full-size architecture, on two GPUs
python benchmarks/sharded_base.py                           on one: what gathering costs by itself
python benchmarks/sharded_base.py --layers 2 --heads 2 --px 128        a small one, on a CPU

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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from train_step import HEAD, RandomTable

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image.modulation import LAYERS, TabledLinear
from qwen_lora.families.qwen_image.sharded import mesh_of, own_rows, shard_blocks
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss
from qwen_lora.train.sharding import FSDP

GIB = 1 << 30
Found = dict[str, Any]


def make_transformer(
    options: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None
) -> Any:
    """Random weights, made on the device one by one; of a spread one its rows are kept."""
    from diffusers import QwenImageTransformer2DModel

    dtype = getattr(torch, options.dtype)
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=options.layers, num_attention_heads=options.heads, attention_head_dim=HEAD
        )
    model.requires_grad_(False)
    model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    torch.manual_seed(0)
    width = options.heads * HEAD
    model.modulation_table = RandomTable(options.layers, width, dtype, device.type == "cuda")
    for block in model.transformer_blocks:
        for name in LAYERS:
            parent = block.get_submodule(name.split(".")[0])
            parent[1] = TabledLinear(parent[1], device, dtype)
    if mesh is not None:
        shard_blocks(model, mesh)
    for number, (name, parameter) in enumerate(list(model.named_parameters())):
        generator = torch.Generator(device).manual_seed(number)
        value = torch.randn(parameter.shape, generator=generator, device=device).mul_(0.02)
        if parameter.ndim == 1:
            value += 1
        owner, _, leaf = name.rpartition(".")
        if mesh_of(parameter) is not None:
            frozen = own_rows(value, parameter, device, dtype)
        else:
            frozen = torch.nn.Parameter(value.to(dtype), requires_grad=False)
        model.get_submodule(owner)._parameters[leaf] = frozen
    return model.to(device)


def measure(options: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None) -> Found:
    family = family_by_name("qwen-image")
    model = make_transformer(options, device, mesh)
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
        title = f"{options.px} px, {options.layers} blocks, {options.dtype}, {world} process(es)"
        header = ["base", "s/step", "held GiB", "peak GiB", "same bits"]
        print_table(title, header, rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
