"""The commands and files of docs/clusters.md: shells and YAML parsers read them, every option
exists, and they start processes as the tests of launchers do."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from qwen_lora.cli import app
from qwen_lora.config.names import fields
from tests.ranks.launchers import accelerate_launch, torchrun

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
KINDS = {"sh": 3, "bash": 1, "yaml": 2}  # blocks of each


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert len(found) == KINDS[language]
    return found


def documents() -> list[dict[str, Any]]:
    return [document for block in blocks("yaml") for document in yaml.safe_load_all(block)]


def scripts() -> list[str]:
    """Every shell script on the page, those inside YAML and quotes included."""
    found = blocks("sh") + blocks("bash")
    for document in documents():
        if document.get("kind") == "Job":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            assert container["command"] == ["bash", "-c"]
            found += container["args"]
        elif "run" in document:
            found += [document["setup"], document["run"]]
    inner = [script for text in found for script in re.findall(r"bash -c '(.*?)'", text, re.DOTALL)]
    assert len(inner) == 2
    return found + inner


def commands() -> list[list[str]]:
    lines = [line for script in scripts() for line in script.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "bash -c" not in line]
    return [line[1:] if line[0] == "exec" else line for line in words if line]


def starts(program: str) -> list[list[str]]:
    return [words for words in commands() if words[0] == program]


def test_shells_can_read_them() -> None:
    for script in scripts():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr, f"{script}\n{done.stderr}"


def test_the_kubernetes_objects_fit_each_other() -> None:
    service, job, _ = documents()
    name = service["metadata"]["name"]
    spec = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["subdomain"] == name and f"{job['metadata']['name']}-0.{name}" in str(spec)
    (container,) = spec["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    assert f"--nnodes {job['spec']['completions']} " in container["args"][0]


def test_every_option_exists() -> None:
    cli: Any = typer.main.get_command(app)
    runs = [words[1:] for words in starts("qwen-lora")]
    for program in ("torchrun", "accelerate"):
        runs += [words[words.index("qwen_lora") + 1 :] for words in starts(program)]
    assert len(runs) == 3 + 3 + 2 + 2
    for words in runs:
        command = cli.commands[words[0]]
        context = command.make_context(words[0], words[1:])  # raises for an unknown option
        for change in context.params["set_options"] or []:
            assert change.partition("=")[0] in fields(), words


def flags(words: list[str]) -> set[str]:
    return {word for word in words[: words.index("-m", 2)] if word.startswith("--")}


@pytest.mark.parametrize(
    ("program", "tried"),
    [("torchrun", torchrun(0, 2, 8, 1)[2:]), ("accelerate", accelerate_launch(0, 2, 8, 1)[2:])],
)
def test_processes_are_started_as_the_tests_start_them(program: str, tried: list[str]) -> None:
    needless = {"--mixed_precision", "--dynamo_backend"}  # they silence hints about defaults
    for words in starts(program):
        assert flags(words) == flags(tried) - needless, words
        assert words[words.index("-m") : words.index("-m") + 2] == ["-m", "qwen_lora"]
