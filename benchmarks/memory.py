"""Predicted and measured memory of a training step, for each way of recomputing.

python benchmarks/memory.py [--px N]... [--text N] [--batch N] [--blocks N] [--width HEADS]
                            [--rank N] [--targets SET]

Random weights of Qwen-Image's shapes are made on the device; no model is needed. On a GPU the
measured peak is torch.cuda.max_memory_allocated of a forward and a backward pass; on a CPU the
storages of the same passes are counted, which is slow at real sizes: take --width 2 --blocks 3
--px 64 there. What the optimizer keeps is not allocated and not in either column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, print_table

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.train.cost.choice import GIB
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.cost.trace import trace
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss

HEAD = 128


def config_of(heads: int, blocks: int) -> dict[str, object]:
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": HEAD,
        "axes_dims_rope": [16, 56, 56],
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": heads,
        "num_layers": blocks,
        "out_channels": 16,
        "patch_size": 2,
    }


def model_folder(folder: Path, heads: int, blocks: int) -> ModelFolder:
    (folder / "transformer").mkdir()
    config = json.dumps(config_of(heads, blocks))
    (folder / "transformer" / "config.json").write_text(config)
    return resolve_model(str(folder), ("transformer",), weights=False)


def real_transformer(model: StepModel, device: torch.device) -> torch.nn.Module:
    """The skeleton with memory behind it: small random weights in the compute type."""
    transformer = model.family.empty_transformer(
        model.model, blocks=model.blocks, dtype=model.dtype, tabled=False
    )
    transformer.to_empty(device=device)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0, 0.02)
    transformer.requires_grad_(False)
    spec = LoraSpec.from_settings(model.settings)
    for _, parameter in add_lora(transformer, spec, model.family, 0):
        parameter.grad = torch.zeros_like(parameter)
    return transformer.train()


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

    def measure(self) -> tuple[int | None, float]:
        """Bytes at the peak, those of the batch and the weights included, and the seconds of a
        second pass; None where memory has run out."""
        if self.latents.device.type != "cuda":
            started = time.perf_counter()
            found = trace(self.losses, "cpu").peak
            held = [*self.transformer.parameters(), self.latents, self.noise, *self.texts]
            held += [p.grad for p in self.transformer.parameters() if p.grad is not None]
            bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in held)
            return found + bytes_held, time.perf_counter() - started
        torch.cuda.empty_cache()
        seconds = 0.0
        try:
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                started = time.perf_counter()
                self.losses().sum().backward()
                torch.cuda.synchronize()
                seconds = time.perf_counter() - started
        except torch.OutOfMemoryError:
            return None, 0.0
        return torch.cuda.max_memory_allocated(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, action="append")
    parser.add_argument("--text", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--width", type=int, default=24, help="heads of 128")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    print(machine())
    if on_gpu:
        print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    settings = Settings(rank=options.rank, lora_targets=options.targets, modulation_table=False)
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name), options.width, options.blocks)
        model = StepModel(folder, settings, torch.bfloat16)
        measure(model, options, torch.device("cuda" if on_gpu else "cpu"))


def measure(model: StepModel, options: argparse.Namespace, device: torch.device) -> None:
    transformer = real_transformer(model, device)
    rows = []
    for px in options.px or [512, 1024]:
        shape = Shape((px // 8, px // 8), (options.text,) * options.batch)
        for way in ("full", str(model.blocks // 2), "selective", "none"):
            recompute = Recompute.parse(way)
            model.family.prepare_training(transformer, ForwardOptions(recompute=recompute))
            cost = model.cost(shape, recompute)
            predicted = cost.peak - cost.lora + 8 * model.lora_parameters
            found, seconds = Passes(model, transformer, shape).measure()
            shown = "out of memory" if found is None else f"{found / GIB:.3f}"
            error = "" if found is None else f"{100 * (predicted / found - 1):+.1f} %"
            rate = cost.flops / seconds / 1e12 if seconds else 0.0
            rows.append(
                [
                    px,
                    str(recompute),
                    f"{predicted / GIB:.3f}",
                    shown,
                    error,
                    f"{seconds:.3f}",
                    f"{rate:.3g}",
                ]
            )
    print_table(
        f"{model.blocks} blocks, {options.width} heads, {options.batch} x {options.text} text "
        f"tokens, LoRA rank {options.rank} on {options.targets}; this project's forward pass",
        ["px", "recompute", "predicted GiB", "measured GiB", "error", "s", "TFLOP/s"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
