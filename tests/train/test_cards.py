"""A recipe for each card: it fits by the planner, docs/cards.md says what the planner says, and a
run with it ends with a LoRA."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_lora.config.load import explicit_keys, load_settings
from qwen_lora.config.schema import DataConfig
from qwen_lora.train.cost.choice import GIB, SIDES
from qwen_lora.train.cost.estimate import CARDS
from qwen_lora.train.run import train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
OTHER_SIDES = [
    pytest.param(side, marks=pytest.mark.slow) if side != 1024 else side for side in SIDES
]


@pytest.fixture(scope="module")
def cards() -> Any:
    """benchmarks/cards.py, which makes the page's tables."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("cards")
    finally:
        sys.path.pop(0)


def section(card: int) -> str:
    return PAGE.split(f"\n## {card} GB")[1].split("\n## ")[0]


def test_every_card_has_a_recipe_and_every_recipe_a_card() -> None:
    found = {path.stem for path in (ROOT / "configs").glob("card-*.yaml")}
    assert found == {f"card-{card}gb" for card in CARDS}
    for card in CARDS:
        assert f"configs/card-{card}gb.yaml" in section(card)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("side", OTHER_SIDES)
@pytest.mark.parametrize("card", CARDS)
def test_it_fits_and_the_page_says_so(cards: Any, card: int, side: int) -> None:
    settings = cards.recipe(card)
    choice = cards.choice(card, side, settings)
    assert choice.missing == 0
    assert choice.cost.peak <= choice.usable < card * GIB
    assert cards.row(card, side, settings) in section(card).splitlines()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_else_would_be(cards: Any) -> None:
    lines = PAGE.splitlines()
    for card, changes in cards.OTHERS:
        assert cards.other_row(card, changes) in lines


@pytest.mark.parametrize("card", CARDS)
def test_a_run_with_it_ends(
    card: int, train_shards: Path, transformer_only: Path, tmp_path: Path
) -> None:
    """In bf16 on a CPU; what auto streams on such a card is streamed here too."""
    update: dict[str, Any] = {
        "shards_dir": train_shards,
        "pretrained_model_name_or_path": str(transformer_only),
        "output_dir": tmp_path / "run",
        "mixed_precision": "bf16",
        "max_train_steps": 2,
        "validation_steps": 0,
        "data_config": DataConfig(),
    }
    file = ROOT / "configs" / f"card-{card}gb.yaml"
    settings = load_settings("train", file, notes=[])
    assert explicit_keys(settings) >= {"base_precision", "rank", "data_config.img_size"}
    if "blocks_on_device" in explicit_keys(settings):
        assert card in (8, 12, 16)
        update["blocks_on_device"] = "0"
    result = train(settings.model_copy(update=update))
    assert result.lora.stat().st_size > 0


def test_the_readme_says_so_too(cards: Any) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for card in (80, 32, 24, 12):
        (line,) = [line for line in lines if line.startswith(f"| {card} GB | ")]
        choice = cards.choice(card, 1024, cards.recipe(card))
        assert line.endswith(f" | {choice.cost.peak / GIB:.1f} GiB |")
        left = choice.way.on_device
        assert left is None or f", {60 - left} of 60 blocks in host memory |" in line
        assert f"configs/card-{card}gb.yaml" in line
