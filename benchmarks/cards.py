"""The tables of docs/cards.md: what the planner says of each card's recipe in configs/.

python benchmarks/cards.py [--card GB]... [--px N]...

Arithmetic from Qwen-Image's config; no weight and no GPU is needed.
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import config_of

from qwen_lora.config.load import load_settings
from qwen_lora.config.schema import Settings
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.train.cost.choice import GIB, SIDES, Choice, choose, usable_bytes
from qwen_lora.train.cost.estimate import CARDS
from qwen_lora.train.cost.shapes import BucketLoad
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.plan import BatchRule

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = config_of(heads=24, blocks=60)
COUNTED = ("base_precision", "low_precision_products", "modulation_table", "compile_blocks",
           "gradient_checkpointing", "recompute", "blocks_on_device", "offload_activations",
           "rank", "lora_targets", "optimizer")  # fmt: skip
TEXT = 256  # tokens of a long caption
OTHERS: list[tuple[int, dict[str, Any]]] = [  # beside the recipes, at 1024 px
    (8, {"base_precision": "nf4"}),
    (12, {"base_precision": "nf4"}),
    (16, {"base_precision": "nf4"}),
    (16, {"base_precision": "bf16"}),
    (24, {"base_precision": "int8"}),
    (24, {"base_precision": "bf16"}),
    (80, {"base_precision": "fp8", "low_precision_products": "both"}),
]
HEADER = ["px", "peak, GiB", "usable", "recomputed", "blocks on it", "in host memory, GiB",
          "copied a step, GiB", "TFLOP a step"]  # fmt: skip


def recipe(card: int) -> Settings:
    return load_settings("train", CONFIGS / f"card-{card}gb.yaml", notes=[])


def choice(card: int, side: int, settings: Settings) -> Choice:
    """What a run chooses on a card of so many GiB that nobody else uses."""
    batch = BatchRule(settings.train_batch_size, 1, 0, batch_pixels=settings.batch_pixels)
    samples = int(batch.sizes(np.array([[side, side]], np.int32))[0])
    model = _step_model(*(str(getattr(_on_a_gpu(settings), name)) for name in COUNTED))
    load = BucketLoad((side, side), 1.0, samples, TEXT, TEXT, equal=False)
    return choose(model, load.largest(model.family), usable_bytes(card * GIB))


def _on_a_gpu(settings: Settings) -> Settings:
    """What compile_blocks: auto becomes there."""
    compiled = settings.compile_blocks
    if compiled == "auto":
        compiled = settings.base_precision != "nf4"
    return settings.model_copy(update={"compile_blocks": compiled})


@cache
def _step_model(*values: str) -> StepModel:
    """One for all recipes that cost the same."""
    settings = Settings.model_validate(dict(zip(COUNTED, values, strict=True)))
    return StepModel(_model(), settings, torch.bfloat16)


@cache
def _model() -> ModelFolder:
    """A folder with nothing but the config, until Python ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    return resolve_model(str(folder), ("transformer",), weights=False)


# ---- tables --------------------------------------------------------------------------------------


def row(card: int, side: int, settings: Settings) -> str:
    """A line of a Markdown table."""
    found = choice(card, side, settings)
    assert found.usable is not None
    blocks = int(str(CONFIG["num_layers"]))
    recompute = found.recompute
    some = f"{recompute.blocks} of {blocks}"
    left = found.way.on_device
    batch = settings.batch_pixels // side**2
    cost = found.cost
    cells = [
        f"{batch} x {side}" if batch > 1 else str(side),
        f"{cost.peak / GIB:.1f}" + (" (does not fit)" if found.missing else ""),
        f"{found.usable / GIB:.1f}",
        {"none": "nothing", "full": "all"}.get(recompute.kind, some),
        "all" if left is None else str(left),
        f"{cost.host / GIB:.1f}" if cost.host else "0",
        f"{cost.traffic / GIB:.1f}" if cost.traffic else "0",
        f"{cost.flops / 1e12:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def other_row(card: int, changes: dict[str, Any]) -> str:
    settings = recipe(card).model_copy(update=changes)
    named = ", ".join(f"`{name}: {value}`" for name, value in changes.items())
    return f"| {card} GB, {named} {row(card, 1024, settings)}"


def table(card: int, sides: Sequence[int] = SIDES) -> list[str]:
    settings = recipe(card)
    return [*_head(HEADER), *(row(card, side, settings) for side in sides)]


def _head(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |", f"|---|{'---:|' * (len(cells) - 1)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", type=int, action="append", choices=CARDS)
    parser.add_argument("--px", type=int, action="append")
    options = parser.parse_args()
    cards = options.card or CARDS
    for card in cards:
        print(f"{card} GB", *table(card, options.px or SIDES), "", sep="\n")
    print(*_head(["instead", *HEADER]), sep="\n")
    print(*(other_row(card, changes) for card, changes in OTHERS if card in cards), sep="\n")


if __name__ == "__main__":
    main()
