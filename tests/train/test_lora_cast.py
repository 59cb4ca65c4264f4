"""LoRA weights that are cast together: the gradients of weights that are cast one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_lora.families import lora_cast
from qwen_lora.families.base import ForwardOptions
from qwen_lora.families.lora_cast import cast_weight
from qwen_lora.train.flat import FlatLora
from tests.train.test_step_cost import RealStep, Shape, small, step_model

SHAPES = ((4, 48), (48, 4), (4, 20), (3, 5), (16, 4))  # two that zeros stand behind


def linears() -> torch.nn.Sequential:
    made = torch.nn.Sequential(*(torch.nn.Linear(b, a, bias=False) for a, b in SHAPES))
    generator = torch.Generator().manual_seed(0)
    for linear in made:
        linear.weight.data.normal_(generator=generator)
    return made


@pytest.mark.parametrize("segment", [1, 200, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_those_of_single_casts(
    monkeypatch: pytest.MonkeyPatch, segment: int, dtype: torch.dtype
) -> None:
    """Over two passes that add up; the third weight is not used."""
    monkeypatch.setattr(lora_cast, "SEGMENT", segment)
    single, together = linears(), linears()
    flat = FlatLora([*together.named_parameters()])
    flat.cast_together(together)
    used = [0, 1, 3, 4]
    for scale in (1.0, 0.37):
        storages = together.lora_cast.begin(dtype)
        expected = {1: 5, 200: 2}.get(segment, 1) if dtype != torch.float32 else 0
        assert len({t.untyped_storage().data_ptr() for t in storages}) == expected
        for model in (single, together):
            weights = [cast_weight(linear, dtype) for linear in model]
            assert all(weight.dtype == dtype for weight in weights)
            sum((scale * weights[i].sin() * weights[i]).sum() for i in used).backward()
    for mine, theirs in zip(together, single, strict=True):
        assert mine.weight.grad is not None
        found = torch.zeros_like(mine.weight) if theirs.weight.grad is None else theirs.weight.grad
        assert torch.equal(mine.weight.grad, found)
    between = flat.gradients.numbers.numel() - sum(math.prod(shape) for shape in SHAPES)
    assert between and int((flat.gradients.numbers == 0).sum()) == between + math.prod(SHAPES[2])


class Casts(TorchDispatchMode):
    """Counts what goes from float32 to bfloat16 and back, and what is added to gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = self.adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.casts += func is torch.ops.aten._to_copy.default and args[0].numel() > 100
        self.adds += func is torch.ops.aten.add_.Tensor
        return func(*args, **(kwargs or {}))


def test_blocks_cast_nothing_of_their_own(tmp_path: Path) -> None:
    """Of a LoRA on four layers of each of five blocks: a cast and an addition for all, and not a
    bit of a loss or gradient differs."""
    found = []
    for together in (False, True):
        folder = tmp_path / str(together)
        model = step_model(folder, torch.bfloat16, small(num_layers=5), rank=4)
        torch.manual_seed(0)
        step = RealStep(model, Shape((8, 12), (5, 3)), "none")
        model.family.prepare_training(step.transformer, ForwardOptions())
        named = [(n, p) for n, p in step.transformer.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for number, (_, parameter) in enumerate(named):
                parameter.normal_(generator=torch.Generator().manual_seed(number))
        flat = FlatLora(named)
        if together:
            flat.cast_together(step.transformer)
        with Casts() as counted:
            losses = step.losses()
            losses.sum().backward()
        found.append((losses.detach(), flat.gradients.numbers, counted, len(named)))
    (losses, gradients, apart, count), (same, equal, joined, _) = found
    assert torch.equal(losses, same) and torch.equal(gradients, equal)
    assert bool(gradients.any())
    assert apart.casts - joined.casts >= 2 * 0.75 * count  # q, k and v cast their A as one
    assert apart.adds - joined.adds == count - 1
