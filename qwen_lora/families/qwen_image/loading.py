# ruff: noqa: TID253
"""Puts safetensors weights into a module made without memory, one tensor at a time.

One path for the VAE's encoder half, the text model without its vision tower, and the transformer in
full or reduced precision, so that none of them ever holds a weight that is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.families.qwen_image import single_file
from qwen_lora.families.qwen_image.scaled import ScaledLinear, Stored
from qwen_lora.families.qwen_image.sharded import mesh_of, of_own_rows, own_rows
from qwen_lora.families.qwen_image.single_file import Weight
from qwen_lora.families.weight_file import Memory, read_ahead, read_memory, spans
from qwen_lora.models import weight_files

QUANTIZATIONS = ("none", "int8", "nf4")


def empty_module(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Run a constructor so that its parameters take no memory; buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


@contextmanager
def damage_explained(folder: Path) -> Iterator[None]:
    """Whatever a library raises over a component's small files becomes an InputError."""
    try:
        yield
    except QwenLoraError:
        raise
    except Exception as error:  # OSError, ValueError, TypeError, KeyError, tokenizers' Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{folder} cannot be loaded, its files are damaged or of another model ({reason[:300]})"
        ) from error


def load_weights(
    module: torch.nn.Module,
    weights: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str | None] = lambda key: key,
    reshape: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    placed: Callable[[str], None] = lambda name: None,
    in_memory: bool = False,
) -> None:
    """Fill every parameter of an empty module from a component's safetensors files, frozen.

    weights: the component's folder, or a transformer in a single file;
    rename: checkpoint key -> parameter name, or None for a weight that is not needed.
    reshape: makes a checkpoint tensor the parameter's; it gets the parameter's name.
    placed: is told the name of each parameter that is there.
    in_memory: also on a CPU weights lie in memory of their own, aligned as torch's; else those that
        keep their type stay mapped there, wherever in the file they are.
    Raises InputError when names or shapes do not fit the module: weights and config disagree.
    """
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if not made_from_weight(module, name)
    }
    missing = set(parameters)
    memory = read_memory(device)

    def take(file: _File) -> None:
        names = {key: name for key in file.weights if (name := rename(key)) is not None}
        if unknown := [key for key, name in names.items() if name not in missing]:
            raise InputError(
                f"{weights} holds a weight {unknown[0]!r} that its config has no place for"
            )

        def is_ahead(key: str, stored: torch.dtype) -> bool:
            if mesh_of(parameters[names[key]]) is not None:
                return False  # its own rows alone are read
            # What a CPU only converts it best reads as it does so.
            kept = in_memory and stored == _kept_dtype(module, names[key], dtype)
            return kept or device.type != "cpu"

        with closing(file.read_all(names, memory, is_ahead)) as tensors:
            for key, tensor in tensors:
                name = names[key]
                missing.discard(name)
                if isinstance(tensor, torch.Tensor):
                    tensor = reshape(name, tensor)
                _check_shape(module, name, parameters[name], tensor, f"{weights}: weight {key!r}")
                place(module, name, tensor, device, dtype)
                placed(name)

    for path in weight_files(weights):
        with _open(path, single=path == weights) as file:
            take(file)
    if missing:
        raise InputError(f"{weights} lacks {len(missing)} weights, the first is {min(missing)!r}")
    module.to(device)  # buffers; parameters are there already
    module.eval().requires_grad_(False)


@contextmanager
def open_weights(weights: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads one weight of a component by its key. It raises InputError for a weight
    that is not there. weights: as in `load_weights`."""
    with ExitStack() as stack:
        files: dict[str, _File] = {}
        for path in weight_files(weights):
            file = stack.enter_context(_open(path, single=path == weights))
            files |= dict.fromkeys(file.weights, file)

        def read(key: str) -> torch.Tensor:
            if key not in files:
                raise InputError(f"{weights} lacks the weight {key!r}")
            found = files[key].read(key)
            return found.dense() if isinstance(found, Stored) else found

        yield read


@dataclass(frozen=True)
class _File:
    path: Path
    mapped: Any  # safetensors' own
    weights: dict[str, Weight]

    def read(self, key: str) -> torch.Tensor | Stored:
        with _reading(self.path):
            weight = self.weights[key]
            return weight.make(self.mapped.get_tensor(weight.key))

    def read_all(
        self,
        keys: Iterable[str],
        memory: Memory,
        is_ahead: Callable[[str, torch.dtype], bool],
    ) -> Generator[tuple[str, torch.Tensor | Stored]]:
        """Each key's weight in turn, valid until the next one is asked for. What `is_ahead`, of a
        key and its type in the file, is read ahead into `memory`, if that is large enough; all else
        is mapped."""
        with _reading(self.path):
            known = spans(self.path)
        ahead = {
            key: span
            for key in keys
            if (span := known.get(self.weights[key].key)) is not None
            and span.size <= memory.limit
            and is_ahead(key, span.dtype)
        }
        with closing(read_ahead(self.path, list(ahead.values()), memory)) as reads:
            for key in keys:
                if key in ahead:
                    with _reading(self.path):
                        weight = self.weights[key].make(next(reads))
                else:
                    weight = self.read(key)
                yield key, weight
                del weight


@contextmanager
def _open(path: Path, *, single: bool) -> Iterator[_File]:
    with ExitStack() as stack:
        with _reading(path):
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            if single:
                found = single_file.weights_of(path, file)
            else:
                found = {key: Weight(key, lambda tensor: tensor) for key in file.keys()}
        yield _File(path, file, found)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); download the model again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _split(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def made_from_weight(module: torch.nn.Module, name: str) -> bool:
    """Whether no file has it: the scales of a spread weight in 8 bits are parameters."""
    owner, leaf = _split(module, name)
    return isinstance(owner, ScaledLinear) and leaf not in ("weight", "bias")


def _check_shape(
    module: torch.nn.Module,
    name: str,
    parameter: torch.nn.Parameter,
    tensor: torch.Tensor | Stored,
    what: str,
) -> None:
    owner, leaf = _split(module, name)
    shape = parameter.shape
    if leaf == "weight" and isinstance(owner, torch.nn.Linear):  # 4-bit weights are packed
        shape = torch.Size((owner.out_features, owner.in_features))
    if tensor.shape != shape:
        raise InputError(
            f"{what} has shape {list(tensor.shape)}, its config asks for {list(parameter.shape)}"
        )


def _kept_dtype(module: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.dtype | None:
    """The type in which a file's tensor becomes this parameter as it is; None: it is converted."""
    owner, leaf = _split(module, name)
    if leaf == "weight" and isinstance(owner, ScaledLinear):
        return owner.low
    return None if leaf == "weight" and hasattr(owner, "quantization") else dtype


def place(
    module: torch.nn.Module,
    name: str,
    tensor: torch.Tensor | Stored,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    owner, leaf = _split(module, name)
    if leaf == "weight" and isinstance(owner, ScaledLinear):
        owner.put(tensor, device)
        return
    if isinstance(tensor, Stored):
        tensor = tensor.dense()
    kind = getattr(owner, "quantization", None) if leaf == "weight" else None
    held = owner._parameters[leaf]
    if mesh_of(held) is not None:
        # Only these rows of the mapped file are read, and the copy lets go of it.
        value = of_own_rows(tensor[own_rows(held)].to(device, dtype, copy=True), held)
    elif kind is None:
        value = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    else:
        value = _quantized_parameter(kind, tensor.to(dtype), owner).to(device)
    owner._parameters[leaf] = value


# ---- 8 and 4 bits --------------------------------------------------------------------------------


def quantize_linears(module: torch.nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Replace every Linear inside an empty module by bitsandbytes' of `kind` (int8 or nf4).

    Sources: LLM.int8() (arXiv:2208.07339), QLoRA's NF4 (arXiv:2305.14314). dtype: the type that
    4-bit products are computed in. Raises InputError if bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    # bitsandbytes logs a line per 8-bit product whose input is not float16: thousands a second.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, linear in list(module.named_modules()):
        if type(linear) is not torch.nn.Linear:
            continue
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if kind == "int8":
            # 6.0 as in the paper: activations beyond it keep 16 bits.
            new = int8_linear_class()(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        elif kind == "nf4":
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
            # On CPUs with AVX512-BF16 a pass without gradients would repack the weights for
            # inference, for good; later gradients could no longer flow through them.
            new.support_avx512bf16_for_cpu = False
        else:
            raise InputError(f"unknown quantization {kind!r}; known: {', '.join(QUANTIZATIONS)}")
        new.quantization = kind
        owner, leaf = _split(module, name)
        setattr(owner, leaf, new)


@cache
def int8_linear_class() -> Any:
    """bitsandbytes' layer without its hold on the input: its product keeps the input until the
    backward pass, where nothing needs it while the weight is frozen, out of checkpointing's sight.
    (1024 x 1024 px, full recomputation: 10 GiB by shapes.)"""
    bnb = _bitsandbytes()

    class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            apply: Any = _Int8Product.apply
            out: torch.Tensor = apply(x, self, super().forward)
            return out

    return Int8Linear


class _Int8Product(torch.autograd.Function):
    """The same numbers as bitsandbytes' `MatMul8bitLt`, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Any, product: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        state = ctx.layer.state
        weight = state.CB.to(ctx.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(gradient.to(ctx.dtype), weight), None, None


def _quantized_parameter(kind: str, tensor: torch.Tensor, linear: Any) -> Any:
    """A bitsandbytes parameter that quantises itself when it is moved to its device."""
    bnb = _bitsandbytes()
    if kind == "int8":
        return bnb.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False)
    return bnb.nn.Params4bit(tensor, requires_grad=False, quant_type="nf4", module=linear)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise InputError("int8 and nf4 need bitsandbytes: pip install 'qwen-lora[quant]'") from None
    return bitsandbytes
