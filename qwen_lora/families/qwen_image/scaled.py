# ruff: noqa: TID253
"""Frozen Linear layers held in 8 bits, with one float32 scale for each output channel.

fp8 is float8_e4m3fn, int8 is symmetric; weight[o, i] = values[o, i] * scale[o]. A product casts the
weight up for its use, or runs in 8 bits itself: then each row of the activations (in the backward
pass of the gradients) gets a scale of its own. The weight has no gradient, so nothing of the input
is kept. (W8A8 with a frozen weight, as OneTrainer trains; row-wise scales as torch's own
`_scaled_mm` takes them.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image.sharded import mesh_of, of_own_rows, own_rows

Rows = tuple[torch.Tensor, torch.Tensor]  # [rows, n] in 8 bits, [rows] their scales
KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
PRODUCTS = ("none", "forward", "both")
ALIGNED = 16  # rows and columns of a weight whose products run in 8 bits
FEW_ROWS = 16  # `_int_mm` wants more
CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}
# In these layers' input a few numbers are far larger than the others: quantised, they cost an
# image's quality (sgl-project/sglang#23155). The modulation layers steer everything else; mostly
# the table stands for them.
FULL_PRECISION = ("img_mlp.net.2", "img_mod.1", "txt_mod.1")
CACHED_ROWS = 64  # of a weight, at most 12,288 wide
_TINY = 1e-12  # the scale of a row of zeros


@dataclass(frozen=True)
class Stored:
    """A weight as a file holds it: values * scale."""

    values: torch.Tensor  # [out, in]
    scale: torch.Tensor  # [out] float32

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, rows: slice) -> Stored:
        return Stored(self.values[rows], self.scale[rows])

    def dense(self) -> torch.Tensor:
        return self.values.float() * self.scale[:, None]  # [out, in]


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Rows:
    """[rows, n] -> the same in `dtype`, and [rows] float32: what to multiply its rows by. A row
    that is not finite gets a scale that is not."""
    scale = x.abs().amax(dim=1).float().clamp(min=_TINY) / LIMITS[dtype]
    scaled = x * (1 / scale)[:, None]  # float32; beyond the limit by rounding at most
    if dtype == torch.int8:
        scaled = scaled.round_()
    return scaled.to(dtype), scale


def _quantize_weight(x: torch.Tensor, dtype: torch.dtype) -> Rows:
    """The same; on a CPU a few rows at a time, whose float32 numbers then stay in its caches."""
    if x.device.type != "cpu":
        return quantize_rows(x, dtype)
    values = torch.empty(x.shape, dtype=dtype)
    scale = torch.empty(len(x))
    for begin in range(0, len(x), CACHED_ROWS):
        part = slice(begin, begin + CACHED_ROWS)
        values[part], scale[part] = quantize_rows(x[part], dtype)
    return values, scale


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] in `dtype`, rounded once: it holds every value of 8 bits exactly."""
    return values.to(dtype).mul_(scale[:, None])


def dequantize_again(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same, for the backward pass. Written in another way on purpose: a compiler would take it
    for the forward pass's, and keep that one until here."""
    return values.t().to(dtype).mul_(scale).t()


class ScaledLinear(torch.nn.Linear):
    """PEFT puts a LoRA on it as on any Linear. `products`: one of PRODUCTS; with both, it holds a
    second copy, [in, out] with a scale for each input channel, since products in 8 bits want the
    summed dimension last in both factors (int8's take the other layout at a sixth of the rate)."""

    scale: torch.Tensor  # [out]
    weight_t: torch.Tensor | None  # [in, out]
    scale_t: torch.Tensor | None  # [in]

    def __init__(self, linear: torch.nn.Linear, kind: str, products: str = "none") -> None:
        outs, ins = linear.out_features, linear.in_features
        super().__init__(ins, outs, linear.bias is not None, device="meta")
        if linear.bias is not None:
            self.bias = linear.bias
        self.kind, self.low = kind, KINDS[kind]
        values = torch.empty(outs, ins, dtype=self.low, device="meta")
        self.weight = torch.nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", torch.empty(outs, device="meta"))
        fits = outs % ALIGNED == 0 and ins % ALIGNED == 0
        self.products = products if fits else "none"
        second = self.products == "both"
        self.register_buffer("weight_t", values.t().contiguous() if second else None)
        self.register_buffer("scale_t", torch.empty(ins, device="meta") if second else None)

    def put(self, weight: torch.Tensor | Stored, device: torch.device) -> None:
        """Take a weight in; of a spread one, the rows that this process holds. One that comes in
        this layer's type is kept as it is."""
        spread = mesh_of(self.weight) is not None
        part = weight[own_rows(self.weight)] if spread else weight
        dense = None  # on the device
        if isinstance(part, Stored) and part.values.dtype == self.low:
            # A copy lets go of the file.
            values, scale = (t.to(device, copy=spread) for t in (part.values, part.scale))
        else:
            dense = _dense(part).to(device)
            values, scale = _quantize_weight(dense, self.low)
        self._hold("weight", values)
        self._hold("scale", scale)
        if self.weight_t is None:
            return
        if spread:
            dense = _dense(weight)[:, own_rows(self.weight_t)].to(device)
        elif dense is None:
            dense = _dense(weight).to(device)
        values, scale = _quantize_weight(dense.t().contiguous(), self.low)
        self._hold("weight_t", values)
        self._hold("scale_t", scale)

    def _hold(self, name: str, value: torch.Tensor) -> None:
        held = getattr(self, name)
        if mesh_of(held) is not None:
            value = of_own_rows(value, held)
        elif name == "weight":
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(self, name, value)

    def forward(self, input: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """rows: what `shared_rows` made of the input."""
        flat = input.flatten(0, -2)  # [tokens, in]
        products = self.products
        # Asked last: torch.compile makes a graph for either answer.
        if products != "none" and flat.shape[0] <= FEW_ROWS:
            products = "none"
        weights = (self.weight, self.scale, self.bias, self.weight_t, self.scale_t)
        apply: Any = _Product.apply
        out: torch.Tensor = apply(flat, *weights, *(rows or (None, None)), products)
        return torch.unflatten(out, 0, input.shape[:-1])


def _dense(weight: torch.Tensor | Stored) -> torch.Tensor:
    return weight.dense() if isinstance(weight, Stored) else weight


def shared_rows(layers: Sequence[torch.nn.Module], x: torch.Tensor) -> Rows | None:
    """The input of several layers, [tokens, in], in 8 bits, if all of them multiply it so."""
    first = layers[0]
    if any(getattr(layer, "products", "none") == "none" for layer in layers):
        return None
    if not isinstance(first, ScaledLinear) or x.shape[0] <= FEW_ROWS:
        return None
    with torch.no_grad():
        return quantize_rows(x, first.low)


class _Product(torch.autograd.Function):
    """x W^T + b, and its gradient with respect to x alone. Keeps the weight and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        values_t: torch.Tensor | None,
        scale_t: torch.Tensor | None,
        low: torch.Tensor | None,
        rows: torch.Tensor | None,
        products: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, scale, values_t, scale_t)
        ctx.both = products == "both"
        if products == "none":
            return F.linear(x, dequantize(values, scale, x.dtype), bias)
        if low is None or rows is None:
            low, rows = quantize_rows(x, values.dtype)
        if values.dtype == torch.int8:
            return _int8_product(low, values.t(), rows, scale, bias, x.dtype)
        return _fp8_product(low, values.t(), rows, scale, bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * 8
        if not ctx.needs_input_grad[0]:
            return None, *nothing
        values, scale, values_t, scale_t = ctx.saved_tensors
        dtype = gradient.dtype
        if not ctx.both:
            return gradient @ dequantize_again(values, scale, dtype), *nothing
        low, rows = quantize_rows(gradient, values.dtype)
        product = _int8_product if values.dtype == torch.int8 else _fp8_product
        return product(low, values_t.t(), rows, scale_t, None, dtype), *nothing


def _int8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [tokens, n] times weight [n, m], exact in int32, then scaled."""
    out = torch._int_mm(x, weight) * rows[:, None]  # [tokens, m] float32
    out.mul_(columns)
    if bias is not None:
        out.add_(bias)
    return out.to(dtype)


def _fp8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [tokens, n] times weight [n, m], whose columns lie one behind the other in memory. The
    result of row-wise scaled products is bfloat16."""
    out = torch._scaled_mm(
        x,
        weight,
        scale_a=rows[:, None],
        scale_b=columns[None],
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)


def bare_product(kind: str, side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """Of two square factors; int8's without its scaling, which is element-wise work (fp8's is in
    the product). Raises InputError as `check_products` does."""
    check_products(kind, device)
    ones = torch.ones(side, device=device)
    x = torch.ones(side, side, device=device, dtype=KINDS[kind])
    weight = x.clone().t()
    if kind == "int8":
        return lambda: torch._int_mm(x, weight)
    return lambda: _fp8_product(x, weight, ones, ones, None, torch.bfloat16)


# ---- in a model ----------------------------------------------------------------------------------


def scale_linears(blocks: torch.nn.Module, kind: str, products: str) -> None:
    """Replace the Linears inside an empty transformer's blocks, but for FULL_PRECISION."""
    for name, linear in list(blocks.named_modules()):
        if type(linear) is torch.nn.Linear and not name.endswith(FULL_PRECISION):
            owner, _, leaf = name.rpartition(".")
            setattr(blocks.get_submodule(owner), leaf, ScaledLinear(linear, kind, products))


def check_products(kind: str, device: torch.device) -> None:
    """Raises InputError where products in 8 bits do not run, before anything is loaded."""
    what = f"low_precision_products with base_precision: {kind}"
    undo = "set low_precision_products: none"
    if device.type == "cuda":
        found, wanted = torch.cuda.get_device_capability(device), CAPABILITY[kind]
        if found < wanted:
            raise InputError(
                f"{what} needs a GPU of compute capability {wanted[0]}.{wanted[1]}, "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; {undo}"
            )
    made = torch.nn.Linear(32, 32, device=device, dtype=torch.bfloat16)
    layer = ScaledLinear(made, kind, "both")
    layer.put(made.weight.detach(), device)
    x = torch.ones(32, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        layer(x).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what} does not run on this {device.type}: {reason}; {undo}") from None
