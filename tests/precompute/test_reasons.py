"""The words of report.jsonl: no other is used, and none is dead."""

import ast
from pathlib import Path
from typing import get_args

import qwen_lora.precompute
from qwen_lora.precompute.reasons import Reason

PLACES = {"Skip": 1, "DecodeError": 0, "CaptionError": 0, "_skip": 1, "_refuse": 1}


def package() -> list[ast.Module]:
    folder = Path(qwen_lora.precompute.__file__).parent
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "reasons.py"]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in files]


def test_every_reason_is_of_the_list() -> None:
    used = set()
    for module in package():
        for node in ast.walk(module):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            place = PLACES.get(name)
            if place is not None and len(node.args) > place:
                argument = node.args[place]
                if isinstance(argument, ast.Constant):
                    used.add(argument.value)
    assert len(used) > 15, "the calls are not found any more"
    assert used <= set(get_args(Reason))


def test_every_reason_is_used() -> None:
    strings = {
        node.value
        for module in package()
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(get_args(Reason)) <= strings
