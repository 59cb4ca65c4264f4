"""A stage's progress on disk: one safetensors file, whole or absent, nothing pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_lora.train.optimizer_state import pack_optimizer, unpack_optimizer


def named(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(module.named_parameters())


def save_state(
    path: Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: dict[str, torch.Tensor] | None = None,
) -> None:
    """averages: moving averages of the parameters, by parameter name."""
    tensors: dict[str, torch.Tensor] = {}
    packed = pack_optimizer(optimizer, named(module), tensors)
    tensors = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
    for name, parameter in named(module):
        tensors[f"module/{name}"] = parameter.detach().contiguous()
    for name, average in (averages or {}).items():
        tensors[f"average/{name}"] = average
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    metadata = {"step": str(step), "optimizer": json.dumps(packed)}
    save_file(tensors, aside, metadata=metadata)
    os.replace(aside, path)


def load_state(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: dict[str, torch.Tensor] | None = None,
) -> int:
    """Returns the number of steps done; 0 when there is no file."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, parameter in named(module):
            parameter.copy_(tensors[f"module/{name}"])
        for name, average in (averages or {}).items():
            average.copy_(tensors[f"average/{name}"])
    saved = {k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("opt")}
    unpack_optimizer(optimizer, named(module), json.loads(metadata["optimizer"]), saved)
    _lay_out_like_parameters(optimizer)
    return int(metadata["step"])


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused AdamW walks memory, not indices: moments must lie as channels-last weights do."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)


class Log:
    """One JSON line every now and then; a rerun drops lines past the step that it starts from."""

    def __init__(self, path: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= first_step]
        path.write_text("".join(kept), encoding="utf-8")
        self._path = path

    def write(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
