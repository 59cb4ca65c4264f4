"""Products of frozen layers: bf16 beside fp8, int8 and nf4, forward and backward, time and error.

python benchmarks/low_precision.py                     Qwen-Image's shapes at 1024 px, on a GPU
python benchmarks/low_precision.py --tokens 64 --width 64 --repeats 1     small ones, on a CPU

A layer is frozen: the backward pass gives the gradient of its input alone. Errors are relative, of
the output and of that gradient, against float32 with the unquantised weight; activations and
gradients are normal, a hundredth of the columns fifty times as large as the rest. "eager" and
"compiled" run the same code. q, k and v are three layers with one input, as a block has them.
Bytes are those of the weights.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, print_table

from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image.adapted import project
from qwen_lora.families.qwen_image.scaled import PRODUCTS, ScaledLinear, check_products

Way = tuple[str, str]  # kind, products
WAYS: list[Way] = [
    ("bf16", "none"),
    *((kind, products) for kind in ("fp8", "int8") for products in PRODUCTS),
    ("nf4", "none"),
]


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine())
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        print(f"GPU: {torch.cuda.get_device_name()}, compute capability {capability}")
    ways = [way for way in WAYS if _runs(way, device)]
    width = options.width
    shapes = [(width, width, 3), (width, width, 1), (width, 4 * width, 1), (4 * width, width, 1)]
    header = ["this project", "run", "forward ms", "backward ms", "together, of bf16"]
    for ins, outs, count in shapes:
        rows, base = [], 0.0
        for way in ways:
            compiles = not options.no_compile and way[0] != "nf4"  # bitsandbytes breaks graphs
            for run in ("eager", "compiled") if compiles else ("eager",):
                found = _measure(way, run, ins, outs, count, options, device)
                if isinstance(found, str):
                    rows.append([f"{way[0]}, products {way[1]}", run, found, *[""] * 6])
                    continue
                base = base or found["forward"] + found["backward"]
                share = (found["forward"] + found["backward"]) / base
                rows.append(
                    [
                        f"{way[0]}, products {way[1]}",
                        run,
                        f"{1000 * found['forward']:.3f}",
                        f"{1000 * found['backward']:.3f}",
                        f"{share:.2f}",
                        f"{found['out']:.2e}",
                        f"{found['gradient']:.2e}",
                        f"{found['bytes'] / 2**20:.1f}",
                        f"{found['peak'] / 2**20:.0f}" if found["peak"] else "-",
                    ]
                )
        title = f"{options.tokens} tokens, {ins} -> {count} x {outs}, {options.repeats} repeats"
        errors = ["error of output", "of gradient", "weights MiB", "peak MiB"]
        print_table(title, [*header, *errors], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4352, help="4096 of 1024 px and 256 of text")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def _runs(way: Way, device: torch.device) -> bool:
    """Says on a line of its own what does not run here."""
    kind, products = way
    try:
        if kind == "nf4":
            import bitsandbytes  # noqa: F401

            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        elif products != "none":
            check_products(kind, device)
    except (ImportError, InputError) as error:
        print(f"left out: {kind}, products {products}: {error}")
        return False
    return True


def _layer(way: Way, weight: torch.Tensor, bias: torch.Tensor) -> torch.nn.Module:
    """A frozen layer with this weight, held as `way` says, where the weight is."""
    kind, products = way
    outs, ins = weight.shape
    plain = torch.nn.Linear(ins, outs, device="meta", dtype=torch.bfloat16)
    plain.bias = torch.nn.Parameter(bias, requires_grad=False)
    if kind == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        layer = Linear4bit(ins, outs, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        layer.support_avx512bf16_for_cpu = False
        layer.bias = plain.bias
        layer.weight = Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", module=layer
        ).to(weight.device)
        return layer
    if kind == "bf16":
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        return plain
    scaled = ScaledLinear(plain, kind, products)
    scaled.put(weight, weight.device)
    return scaled


def _measure(
    way: Way,
    run: str,
    ins: int,
    outs: int,
    count: int,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, float] | str:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    def uneven(rows: int, columns: int) -> torch.Tensor:
        values = normal(rows, columns)
        values[:, :: max(1, columns // 31)] *= 50
        return values.bfloat16()

    weights = [(normal(outs, ins) / ins**0.5).bfloat16() for _ in range(count)]
    biases = [normal(outs).bfloat16() for _ in range(count)]
    layers = [_layer(way, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    x = uneven(options.tokens, ins).requires_grad_()
    gradients = [uneven(options.tokens, outs) for _ in range(count)]

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        return project(layers, x)

    torch._dynamo.reset()
    function: Callable[..., Any] = torch.compile(forward) if run == "compiled" else forward
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    try:
        for repeat in range(options.repeats + 3):
            if repeat == 3 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            x.grad = None
            begun = _now(device)
            found = function(x)
            between = _now(device)
            torch.autograd.backward(found, gradients)
            if repeat >= 3:
                times["forward"].append(between - begun)
                times["backward"].append(_now(device) - between)
    except Exception as error:  # a card or a compiler may not have one of them: the others count
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    exact = x.detach().float().requires_grad_()
    outs_ = [F.linear(exact, w.float(), b.float()) for w, b in zip(weights, biases, strict=True)]
    torch.autograd.backward(outs_, [gradient.float() for gradient in gradients])
    return {
        **{name: statistics.median(taken) for name, taken in times.items()},
        "out": max(_off(one, other) for one, other in zip(found, outs_, strict=True)),
        "gradient": _off(x.grad, exact.grad),
        "bytes": sum(_bytes(layer) for layer in layers),
        "peak": peak,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _off(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert found is not None and exact is not None
    found, exact = found.detach().float(), exact.detach()
    return float((found - exact).norm() / exact.norm())


def _bytes(layer: torch.nn.Module) -> int:
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
