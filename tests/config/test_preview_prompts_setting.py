"""`preview_prompts`: a list, or one prompt with all its commas."""

from pathlib import Path

import pytest

from qwen_lora.config.field import MAX_PROMPTS
from qwen_lora.config.load import load_settings
from qwen_lora.config.names import setting_facts
from qwen_lora.errors import InputError


def load(tmp_path: Path, text: str = "", *set_options: str) -> list[str]:
    file = tmp_path / "lora.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings("precompute", file, set_options, notes=[]).preview_prompts


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("", []),
        ("preview_prompts:", []),
        ("preview_prompts: []", []),
        ("preview_prompts: a cat, sitting", ["a cat, sitting"]),
        ("preview_prompts: [a cat, 7]", ["a cat", "7"]),
        ("preview_prompts:\n- a cat, sitting\n- a dog\n- a cat, sitting ", None),
        ("preview_prompts: |\n  a cat,\n  sitting\n", ["a cat,\nsitting"]),
    ],
)
def test_what_a_file_says(tmp_path: Path, text: str, prompts: list[str] | None) -> None:
    assert load(tmp_path, text) == (["a cat, sitting", "a dog"] if prompts is None else prompts)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a cat, sitting", ["a cat, sitting"]),
        ('["a cat, sitting", a dog]', ["a cat, sitting", "a dog"]),
        ("", []),
    ],
)
def test_what_set_says(tmp_path: Path, given: str, prompts: list[str]) -> None:
    assert load(tmp_path, "preview_prompts: another", f"preview_prompts={given}") == prompts


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('preview_prompts: ""', "entry 1 is empty"),
        ('preview_prompts: [a, "  "]', "entry 2 is empty"),
        ("preview_prompts: [a, ]\nx: 1", "unknown key"),
        ("preview_prompts: [a, [b]]", "entry 2 must be text"),
        ("preview_prompts: {a: b}", "must be a list"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load(tmp_path, text)


def test_the_number_is_limited(tmp_path: Path) -> None:
    most = [f"prompt {number}" for number in range(MAX_PROMPTS)]
    assert (
        load(tmp_path, f"preview_prompts: {most}")
        == most
        == load(tmp_path, f"preview_prompts: {most + most}")
    )
    with pytest.raises(InputError, match="65 prompts are more than 64"):
        load(tmp_path, f"preview_prompts: {[*most, 'one more']}")


def test_it_changes_no_tensor_of_a_sample() -> None:
    facts = setting_facts()["preview_prompts"]
    assert (facts.command, facts.changes) == ("precompute", "nothing")
