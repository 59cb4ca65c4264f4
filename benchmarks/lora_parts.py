"""A LoRA alone: PEFT's layers beside this project's, the three forms of AdamW, and what a step does
to gradients and weights, tensor by tensor and over all tensors as one.

python benchmarks/lora_parts.py [--tokens N] [--width N] [--rank N] [--repeats N] [--millions N ...]
                                [--tensors N]

Layers: q, k, v of one attention on one input, base weights frozen, forward and backward. "kept" is
what autograd holds for the backward pass besides weights, a token. Optimizer: one step over the
tensors of a LoRA of so many parameters. Around it: --tensors A and B of Qwen-Image's attention; the
"first gradient" is what autograd does with those of a step's first micro-batch, which it keeps, or
adds to what is there. On a CPU the ratios are not those of a GPU; operators and bytes are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import machine, median_ms, print_table, spread, take_turns
from peft import LoraConfig, inject_adapter_in_model
from trainer_overhead import Counter

from qwen_lora.families.modules import ADAPTER
from qwen_lora.families.qwen_image.adapted import project
from qwen_lora.train.flat import FlatLora

WIDTH = 3072  # of Qwen-Image
NAMES = ("to_q", "to_k", "to_v")


def attention(width: int, rank: int) -> torch.nn.Module:
    module = torch.nn.Module()
    for name in NAMES:
        module.add_module(name, torch.nn.Linear(width, width))
    module.requires_grad_(False)
    targets = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(NAMES))
    inject_adapter_in_model(targets, module, adapter_name=ADAPTER)
    return module


def kept_bytes(run: Callable[[], torch.Tensor], module: torch.nn.Module) -> int:
    """Of storages that autograd keeps, without the module's own."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    found = sum(size for pointer, size in kept.items() if pointer not in own)
    del out
    return found


def layers(options: argparse.Namespace) -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        module = attention(options.width, options.rank)
        for layer in module.children():
            layer.base_layer.to(dtype)  # type: ignore[union-attr, operator]
        x = torch.randn(1, options.tokens, options.width, dtype=dtype, requires_grad=True)

        def peft(module: torch.nn.Module = module, x: torch.Tensor = x) -> torch.Tensor:
            return torch.cat([module.get_submodule(name)(x) for name in NAMES])

        def ours(module: torch.nn.Module = module, x: torch.Tensor = x) -> torch.Tensor:
            return torch.cat(project([module.get_submodule(name) for name in NAMES], x))

        ways = {"PEFT's layers": peft, "this project": ours}
        runs = {name: _both_passes(way) for name, way in ways.items()}
        taken = take_turns(runs, options.repeats)
        base = median_ms([one.wall for one in taken["PEFT's layers"]], 1)
        for name, times in taken.items():
            with Counter() as counter:
                runs[name]()
            wall = [one.wall for one in times]
            kept = kept_bytes(ways[name], module) / options.tokens / options.width
            rows.append(
                [
                    f"{str(dtype).removeprefix('torch.')}, {name}",
                    f"{median_ms(wall, 1):.2f}",
                    spread(wall, 1),
                    f"{median_ms(wall, 1) / base:.2f}",
                    counter.operators,
                    f"{kept:.2f}",
                ]
            )
    print_table(
        f"q, k, v of {options.tokens} x {options.width}, rank {options.rank}, forward and "
        f"backward, {options.repeats} repeats in turn, ms",
        ["", "median", "min-max", "vs PEFT", "operators", "kept bytes a number of x"],
        rows,
    )


def _both_passes(way: Callable[[], torch.Tensor]) -> Callable[[], None]:
    return lambda: way().sum().backward()  # type: ignore[no-untyped-call]


def optimizers(options: argparse.Namespace) -> None:
    rows = []
    for millions in options.millions:
        # Pairs of A [r, 3072] and B [3072, r], as many as it takes.
        pairs = max(1, round(millions * 1e6 / (2 * 16 * 3072)))
        shapes = [(16, 3072), (3072, 16)] * pairs
        forms = {
            "one tensor after the other": {"foreach": False},
            "foreach": {"foreach": True},
            "fused (this project)": {"fused": True},
        }
        ways = {}
        for name, form in forms.items():
            parameters = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            ways[name] = torch.optim.AdamW(parameters, lr=1e-4, **form).step
        taken = take_turns(ways, options.repeats)
        base = median_ms([one.wall for one in taken["foreach"]], 1)
        for name, times in taken.items():
            wall = [one.wall for one in times]
            rows.append(
                [
                    f"{pairs * 2 * 16 * 3072 / 1e6:.1f} M, {name}",
                    f"{median_ms(wall, 1):.1f}",
                    spread(wall, 1),
                    f"{median_ms(wall, 1) / base:.2f}",
                ]
            )
    print_table(
        f"a step of AdamW in float32, {options.repeats} repeats in turn, ms",
        ["", "median", "min-max", "vs foreach"],
        rows,
    )


def gradients(options: argparse.Namespace) -> None:
    """The parts of a step around AdamW, one tensor after the other and as the trainer does it."""
    shapes = [(options.rank, WIDTH), (WIDTH, options.rank)] * (options.tensors // 2)
    rows = []
    for name in ("tensor by tensor", "as one (this project)"):
        named = [
            (str(n), torch.nn.Parameter(torch.randn(shape) * 0.02))
            for n, shape in enumerate(shapes)
        ]
        arriving = [torch.randn(shape) for shape in shapes]
        parameters = [parameter for _, parameter in named]
        if name == "tensor by tensor":
            parts = apart(parameters, arriving)
        else:
            parts = together(named, arriving)
        _ = [part() for part in parts.values()]  # the optimizer's state is made
        taken = take_turns(parts, options.repeats)
        for part, times in taken.items():
            with Counter() as counter:
                parts[part]()
            wall = [one.wall for one in times]
            rows.append(
                [f"{name}, {part}", f"{median_ms(wall, 2):.2f}", spread(wall, 2), counter.operators]
            )
    print_table(
        f"{len(shapes)} tensors of rank {options.rank}, width {WIDTH}, float32, "
        f"{options.repeats} repeats in turn, ms",
        ["", "median", "min-max", "operators"],
        rows,
    )


Parts = dict[str, Callable[[], object]]


def apart(parameters: list[torch.nn.Parameter], arriving: list[torch.Tensor]) -> Parts:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def keep() -> None:
        for parameter, gradient in zip(parameters, arriving, strict=True):
            parameter.grad = gradient

    keep()
    return {
        "clear": optimizer.zero_grad,
        "first gradient": keep,
        "norm and clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        "update": optimizer.step,
    }


def together(named: list[tuple[str, torch.nn.Parameter]], arriving: list[torch.Tensor]) -> Parts:
    flat = FlatLora(named)
    optimizer = torch.optim.AdamW([flat.weight], lr=1e-4, fused=True)
    gradients = [parameter.grad for _, parameter in named]

    def add() -> None:
        for held, gradient in zip(gradients, arriving, strict=True):
            assert held is not None
            held += gradient

    def clip() -> None:
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        torch.nn.utils.clip_grads_with_norm_([flat.weight], 1.0, norm)

    return {
        "clear": flat.gradients.clear,
        "first gradient": add,
        "norm and clip": clip,
        "(a norm of all numbers at once)": flat.gradients.numbers.norm,
        "update": optimizer.step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--millions", type=float, nargs="+", default=[47.2, 106.2])
    parser.add_argument("--tensors", type=int, default=480)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    layers(options)
    optimizers(options)
    gradients(options)


if __name__ == "__main__":
    main()
