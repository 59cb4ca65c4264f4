"""`qwen-lora init`: every key, its sentence, its default; and what a run prints at its start."""

import re
from pathlib import Path
from typing import Any

import pytest

from qwen_lora.config.checks import NO_EFFECT
from qwen_lora.config.load import load_settings
from qwen_lora.config.names import fields
from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.config.template import describe, template, yaml_text

COMMENTED = re.compile(r"^( *)# ([a-z_0-9]+):( .*)?$")


def uncommented(text: str) -> dict[str, tuple[str, bool]]:
    """dotted key -> its line, and whether the line is live."""
    found: dict[str, tuple[str, bool]] = {}
    keys = {key.rsplit(".", 1)[-1] for key in fields()}
    for line in text.splitlines():
        live = re.match(r"^( *)([a-z_0-9]+):( .*)?$", line)
        match = live or COMMENTED.match(line)
        if match is None or match[2] not in keys:
            continue
        key = f"data_config.{match[2]}" if match[1] else match[2]
        assert key not in found, key
        found[key] = (f"{match[2]}:{match[3] or ''}", bool(live))
    return found


@pytest.mark.parametrize("command", ["precompute", "train"])
def test_loading_the_template_gives_the_defaults(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text(template(), encoding="utf-8")
    notes: list[str] = []
    assert load_settings(command, file, notes=notes) == Settings()
    assert notes == []


def test_every_key_stands_once_with_its_sentence_and_default(tmp_path: Path) -> None:
    text = template()
    lines = uncommented(text)
    assert lines.keys() == fields().keys()
    flat = " ".join(text.replace("#", " ").split())
    conditional = {rule.key for rule in NO_EFFECT}
    for key, (line, _) in lines.items():
        assert " ".join((fields()[key].description or "").split()).replace("#", "") in flat or (
            "#" in (fields()[key].description or "")
        )
        if key in conditional:
            continue
        file = tmp_path / "one.yaml"
        section, dot, _ = key.partition(".")
        file.write_text(f"{section}:\n  {line}\n" if dot else line, encoding="utf-8")
        assert load_settings("train", file) == Settings(), key
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    "value",
    ["plain", "", " padded ", "#ffffff", "a: b", 'say "hi" \\ there', "no", "{x}", "- a", "?"]
    + ["null", "~", "line\nbreak", "日本語", "a #b", "-1", "a,b", "tab\tb", "x:"],
)
def test_text_survives_yaml(value: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text(f"data_config:\n  trigger_word: {yaml_text(value)}\n", encoding="utf-8")
    assert load_settings("train", file).data_config.trigger_word == value


def test_describe_shows_everything_a_command_reads() -> None:
    settings = Settings(rank=4, data_config=DataConfig(img_size=[512, 768], flip="both"))
    text = describe("train", settings)
    assert "  rank: 4\n" in text
    assert "vae_dtype" not in text and "flip" not in text
    assert "learning_rate=0.0001" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    text = describe("precompute", settings)
    assert "  data_config.img_size: [512, 768]\n" in text and "  data_config.flip: both\n" in text
    assert "rank" not in text
