# ruff: noqa: TID253
"""Optimizers by name, or any `module.Class` with arguments."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.train.flat import FlatLora, fits

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]
# name -> module, class and the extra that installs it
NAMED = {
    "adamw": ("torch.optim", "AdamW", None),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "quant"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigy"),
}
_FUSED_DEVICES = ("cuda", "cpu")


def build_optimizer(
    parameters: NamedParameters, settings: Settings
) -> tuple[torch.optim.Optimizer, FlatLora | None]:
    """`make_optimizer`'s, over all parameters as one tensor where that changes no bit."""
    optimizer = make_optimizer(parameters, settings)
    if not fits(optimizer, parameters):
        return optimizer, None
    flat = FlatLora(parameters)
    return make_optimizer([("flat", flat.weight)], settings), flat


def make_optimizer(parameters: NamedParameters, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer over float32 LoRA parameters.

    The named optimizers get every `adam_*` setting; a `module.Class` gets those that differ from
    their defaults and keeps its own values otherwise; `optimizer_args` win over both. What it gets
    depends on the settings' values alone, so a resumed run gets the same.
    Raises InputError for a name, an argument or a missing extra, with what to do.
    """
    name = settings.optimizer
    kind = _named(name) if name in NAMED else _by_path(name)
    accepted = _accepted(kind)
    arguments = _adam_arguments(settings, accepted)
    weights = [parameter for _, parameter in parameters]
    if name == "adamw" and not {"foreach", "differentiable"} & settings.optimizer_args.keys():
        arguments["fused"] = all(weight.device.type in _FUSED_DEVICES for weight in weights)
    arguments |= _own_arguments(settings.optimizer_args, accepted, name)
    make: Any = kind
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy announces its weight decay
            optimizer: torch.optim.Optimizer = make(weights, lr=settings.learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"optimizer {name} refuses its arguments: {reason}") from error
    return optimizer


def _named(name: str) -> type[torch.optim.Optimizer]:
    module, class_name, extra = NAMED[name]
    try:
        kind: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        raise InputError(
            f"optimizer {name} needs {module.partition('.')[0]} ({error}): "
            f"pip install 'qwen-lora[{extra}]'"
        ) from None
    return kind


def _by_path(path: str) -> type[torch.optim.Optimizer]:
    """The class that `module.Class` names; its module's code runs, as the user asks."""
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        known = ", ".join(NAMED)
        raise InputError(
            f"unknown optimizer {path!r}; known: {known}, or module.Class, as torch.optim.Adagrad"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code may raise anything
        raise InputError(
            f"optimizer {path}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    kind = getattr(module, class_name, None)
    if kind is None:
        hint = _nearest(class_name, vars(module))
        raise InputError(f"optimizer {path}: {module_name} has no {class_name!r}{hint}")
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(f"optimizer {path} is not a torch optimizer class")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"optimizer {path} needs a closure for each step, which training has not")
    return kind


def _accepted(kind: type[torch.optim.Optimizer]) -> Mapping[str, inspect.Parameter]:
    """The constructor's arguments besides the parameters."""
    return dict([*inspect.signature(kind).parameters.items()][1:])


def _takes_any(accepted: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())


def _adam_arguments(
    settings: Settings, accepted: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """What the `adam_*` settings give. Raises InputError for one that was changed in vain."""
    values: dict[str, Any] = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    if settings.optimizer in NAMED:
        return values
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    sources = {
        "betas": ("adam_beta1", "adam_beta2"),
        "eps": ("adam_epsilon",),
        "weight_decay": ("adam_weight_decay",),
    }
    chosen = {}
    for argument, names in sources.items():
        changed = [name for name in names if getattr(settings, name) != defaults[name]]
        if not changed:
            continue
        if argument not in accepted and not _takes_any(accepted):
            raise InputError(
                f"{changed[0]} has no effect: optimizer {settings.optimizer} takes no {argument!r}"
            )
        chosen[argument] = values[argument]
    return chosen


def _own_arguments(
    given: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter], name: str
) -> dict[str, Any]:
    """`optimizer_args`, checked by name; lists become the tuples that optimizers expect."""
    for key in given:
        if key == "lr":
            raise InputError("optimizer_args: lr is the setting learning_rate")
        if key not in accepted and not _takes_any(accepted):
            raise InputError(
                f"optimizer_args: {name} takes no {key!r}{_nearest(key, accepted)}; it takes "
                f"{', '.join(sorted(set(accepted) - {'lr'}))}"
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, [key for key in known if not key.startswith("_")], n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
