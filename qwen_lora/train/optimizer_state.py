# ruff: noqa: TID253
"""An optimizer's state by parameter name, as tensors and JSON, for any optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.train.flat import FlatLora
from qwen_lora.train.tree import pack, unpack

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]
_PROBE_SHAPE = (64, 80)  # above the 4096 numbers from which 8-bit optimizers use 8 bits


def pack_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: NamedParameters,
    tensors: dict[str, torch.Tensor],
    flat: FlatLora | None = None,
) -> Any:
    """The JSON form of the state; its tensors go into `tensors` as `<parameter>/<key>`. flat: what
    `optimizer` updates, made of `parameters`."""
    names = list(chain(*_names_by_group(optimizer, parameters, flat)))
    state = optimizer.state_dict()
    if flat is not None:
        state = flat.split(state)
    return {
        "state": {names[i]: pack(value, names[i], tensors) for i, value in state["state"].items()},
        "groups": [
            pack({**group, "params": [names[i] for i in group["params"]]}, "group", tensors)
            for group in state["param_groups"]
        ],
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: NamedParameters,
    packed: Any,
    tensors: Mapping[str, torch.Tensor],
    flat: FlatLora | None = None,
) -> None:
    """Load what `pack_optimizer` made, with `flat` or without, into an optimizer over the same
    parameters, in any order inside their groups. Raises QwenLoraError when the parameters are
    others."""
    grouped = _names_by_group(optimizer, parameters, flat)
    index = {name: i for i, name in enumerate(chain(*grouped))}
    groups = []
    for packed_group, names in zip(packed["groups"], grouped, strict=True):
        if sorted(packed_group["params"]) != sorted(names):
            raise QwenLoraError("the checkpoint's optimizer state is of other parameters")
        # torch pairs saved and present parameters by position.
        here = [index[name] for name in names]
        groups.append({**unpack(packed_group, tensors), "params": here})
    state = {index[name]: unpack(value, tensors) for name, value in packed["state"].items()}
    loaded = {"state": state, "param_groups": groups}
    optimizer.load_state_dict(loaded if flat is None else flat.join(loaded))


def check_state_fits(
    make: Callable[[NamedParameters], torch.optim.Optimizer],
    parameters: NamedParameters,
    packed: Any,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Compare saved state with what `make`'s optimizer keeps of such parameters after a step: fused
    and 8-bit kernels trust its shapes, and would read and write beyond smaller tensors.

    Raises QwenLoraError when a tensor is missing or of another shape or dtype, or when a group has
    another flag.
    """
    shapes = {parameter.shape: parameter.device for _, parameter in parameters}
    expected: dict[tuple[torch.Size, str], set[tuple[torch.Size, torch.dtype]]] = {}
    for fill in (torch.ones, torch.zeros):  # Prodigy keeps a zero start as one number
        fresh, groups = _fresh_state(make, shapes, fill)
        for place, tensor in fresh.items():
            expected.setdefault(place, set()).add(_kind(tensor))
    for name, parameter in parameters if packed["state"] else ():
        for (shape, key), kinds in expected.items():
            saved = tensors.get(f"{name}/{key}")
            if shape != parameter.shape or (saved is not None and _kind(saved) in kinds):
                continue
            found = "missing" if saved is None else f"{list(saved.shape)} {saved.dtype}"
            raise QwenLoraError(
                f"the checkpoint's optimizer state does not fit this run: {name}/{key} is {found}"
            )
    for group, own in zip(packed["groups"], groups, strict=True):
        for key, value in own.items():
            if _is_flag(value) and group.get(key) != value:
                raise QwenLoraError(
                    f"the checkpoint's optimizer state has {key} {group.get(key)!r}, this run's "
                    f"optimizer {value!r}"
                )


def _fresh_state(
    make: Callable[[NamedParameters], torch.optim.Optimizer],
    shapes: Mapping[torch.Size, torch.device],
    fill: Callable[[torch.Size], torch.Tensor],
) -> tuple[dict[tuple[torch.Size, str], torch.Tensor], Any]:
    """After a step, the state's tensors by shape of the parameter and key, and the groups."""
    names = {str(number): shape for number, shape in enumerate(shapes)}
    probes = [
        (name, torch.nn.Parameter(fill(shape).to(shapes[shape]))) for name, shape in names.items()
    ]
    for _, probe in probes:
        probe.grad = torch.ones_like(probe)
    optimizer = make(probes)
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_optimizer(optimizer, probes, tensors)
    split = ((name.partition("/"), tensor) for name, tensor in tensors.items())
    state = {(names[name], key): tensor for (name, _, key), tensor in split if name in names}
    return state, packed["groups"]


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _is_flag(value: Any) -> bool:
    """Not so learning rates and counters, which change from step to step."""
    return value is None or isinstance(value, bool | str)


def check_round_trip(
    make: Callable[[NamedParameters], torch.optim.Optimizer], device: torch.device
) -> None:
    """Try before the first step whether a checkpoint can hold this optimizer's state: two steps, a
    round trip in between, against two steps without one. Raises InputError if not."""
    generator = torch.Generator().manual_seed(0)
    shapes = (_PROBE_SHAPE, (1, 8))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]

    def fresh(values: Sequence[torch.Tensor]) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (f"probe.{i}", torch.nn.Parameter(value.clone().to(device)))
            for i, value in enumerate(values)
        ]

    def step(optimizer: torch.optim.Optimizer, parameters: NamedParameters, number: int) -> None:
        for (_, parameter), gradient in zip(parameters, gradients[number], strict=True):
            parameter.grad = gradient.clone().to(device)
        optimizer.step()

    first = fresh(start)
    unbroken = make(first)
    try:
        step(unbroken, first, 0)
    except (TypeError, ValueError, RuntimeError) as error:  # sparse gradients only, a closure, ...
        name = type(unbroken).__name__
        raise InputError(f"optimizer {name} cannot train a LoRA: {error}") from error
    second = fresh([parameter.detach().cpu() for _, parameter in first])
    resumed = make(second)
    try:
        tensors: dict[str, torch.Tensor] = {}
        packed = copy.deepcopy(pack_optimizer(unbroken, first, tensors))
        unpack_optimizer(resumed, second, packed, tensors)
        step(unbroken, first, 1)
        step(resumed, second, 1)
    except (QwenLoraError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(_refusal(unbroken, str(error))) from error
    for (_, one), (_, other) in zip(first, second, strict=True):
        if not torch.equal(one, other):
            raise InputError(_refusal(unbroken, "it continues differently after loading"))


def _refusal(optimizer: torch.optim.Optimizer, why: str) -> str:
    return (
        f"optimizer {type(optimizer).__name__}: its state does not survive a checkpoint ({why}); "
        "choose another optimizer"
    )


def _names_by_group(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, flat: FlatLora | None
) -> list[list[str]]:
    """Parameter names in the order in which state_dict numbers them."""
    if flat is not None:
        return [flat.names]
    by_identity = {id(parameter): name for name, parameter in parameters}
    return [[by_identity[id(p)] for p in group["params"]] for group in optimizer.param_groups]
