"""The command line's surface is frozen text: a new or changed option shows in review.

`UPDATE_HELP=1 pytest tests/test_cli_help.py` writes the files anew.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cli_help"
COMMANDS = [
    "",
    "precompute",
    "train",
    "plan",
    "sample",
    "init",
    "tiny-model",
    "demo",
    "shards",
    "shards info",
    "shards verify",
    "shards list",
    "shards merge",
    "shards prune",
    "shards preview",
]
ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
HEAVY = ["torch", "diffusers", "transformers", "peft", "accelerate", "webdataset", "cv2",
         "matplotlib", "PIL", "numpy", "yaml"]  # fmt: skip


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "qwen_lora"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=60,
    )


def file_of(command: str) -> Path:
    return FOLDER / f"{command.replace(' ', '-') or 'qwen-lora'}.txt"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_committed_text(command: str) -> None:
    result = run(*command.split(), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    if os.environ.get("UPDATE_HELP"):
        file_of(command).write_text(result.stdout, encoding="utf-8")
    assert result.stdout == file_of(command).read_text(encoding="utf-8")
    if command != "shards":
        assert "  qwen-lora " in result.stdout  # an example


def test_no_help_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {file_of(c).name for c in COMMANDS}


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    code = f"""
import sys
from qwen_lora.cli import app
try:
    app(["train", "-h"], prog_name="qwen-lora")
except SystemExit as stop:
    assert not stop.code
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    started = time.monotonic()
    result = run(code=code)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    assert time.monotonic() - started < 20  # a hang, not a benchmark


def test_version() -> None:
    from qwen_lora import __version__

    assert run("--version").stdout == f"qwen-lora {__version__}\n"
