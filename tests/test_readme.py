"""Every command of the README and of the pages on shard sets runs, as a reader would type them.

What stands for a real model, dataset and duration is exchanged for the tiny model, small images and
few steps, and the URLs for servers here; everything else is as printed.
"""

import gc
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.shards.reader import ShardSet
from tests.s3_server import BUCKET, S3Server
from tests.shards.fault_server import serve

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
SMALL = ["--set", "encode_threads=1"]
EXCHANGED = {
    "--resolution": "64",
    "--max-train-steps": "2",
    "--num-processes": "2",
}


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path, language: str = "sh") -> list[list[str]]:
    """The `qwen-lora` lines of all shell blocks, without their comments."""
    lines = [line for block in code_blocks(page, language) for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words and words[0] == "qwen-lora"]


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the pages' URLs stand for: a web server over `shards`, and an object store."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    with serve(tmp_path / "shards") as web, S3Server() as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        yield {"https://example.org/shards": web.url, "s3://bucket/": f"s3://{BUCKET}/"}


def exchange(words: list[str], model: Path, urls: dict[str, str]) -> list[str]:
    """The same command at a size for a test."""
    command = words[0]
    out = []
    for word, before in zip(words, ["", *words], strict=False):
        for told, here in urls.items():
            word = word.replace(told, here)
        is_model = before in ("--model", "--vae")
        out.append(str(model) if is_model else EXCHANGED.get(before, word))
    if command in ("precompute", "train"):
        out += SMALL
        out += [] if "--model" in words else ["--model", str(model)]
        if command == "precompute" and "--resolution" not in words and "--config" not in words:
            out += ["--resolution", "64"]
        if "--config" in words:
            out += ["--set", "shards_dir=shards-config", "--set", "output_dir=output-config"]
            out += ["--set", "data_config.img_dir=photos", "--set", "data_config.img_size=64"]
        if command == "train" and "--max-train-steps" not in words:
            out += ["--max-train-steps", "2"]
        if command == "train" and words == ["train", "shards"]:
            out += ["--output", "output-first"]
    if command == "sample":
        out += ["--steps", "2", "--height", "64", "--width", "64"]
    return out


def run(words: list[str], model: Path, urls: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    arguments = exchange(words, model, urls)
    patch.setattr(sys, "argv", ["qwen-lora", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{words}: {result.output}\n{result.exception!r}"


def test_there_are_commands_of_every_kind() -> None:
    kinds = {words[0] for words in commands(README)}
    assert kinds >= {"precompute", "train", "sample", "shards", "init"}


@pytest.mark.multiprocess
def test_the_commands_run(
    tiny_model: Path,
    image_folder: Path,
    servers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(README.parent))  # for the processes that train starts
    shutil.copytree(image_folder, "photos")
    for words in commands(README):
        if "others" in words:
            shutil.copytree("shards", "others")
        run(words, tiny_model, servers, monkeypatch)
    for name in ("output/lora.safetensors", "output-node/lora.safetensors", "grid.png"):
        assert Path(name).is_file()
    _check_python_blocks(tiny_model)


@pytest.mark.parametrize("page", ["shards.md", "remote.md"])
def test_the_commands_of_a_page_run(
    page: str,
    tiny_model: Path,
    image_folder: Path,
    servers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder, "photos")
    run(["precompute", "photos"], tiny_model, servers, monkeypatch)
    for copy in ("mine", "theirs"):
        shutil.copytree("shards", copy)
    found = commands(DOCS / page, "bash")
    assert len(found) >= 4
    for words in found:
        run(words, tiny_model, servers, monkeypatch)


def _check_python_blocks(tiny_model: Path) -> None:
    """The diffusers lines load the file that the commands made."""
    (block,) = code_blocks(README, "python")
    names: dict[str, object] = {}
    exec(block.replace("Qwen/Qwen-Image", str(tiny_model)), names)
    pipeline = names["pipeline"]
    assert pipeline.get_active_adapters() == ["default_0"]  # type: ignore[attr-defined]


# webdataset leaves the files it has read to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_shard_page_reads_a_set_with_others_tools(
    tiny_model: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(tiny_model), "--resolution", "64", *SMALL]
    result = CliRunner().invoke(app, ["precompute", str(image_folder), *options])
    assert result.exit_code == 0, result.output
    block, drawing = code_blocks(DOCS / "shards.md", "python")
    (shard,) = Path("shards").glob("*.tar")
    capsys.readouterr()
    exec(block.replace("SHARD", shard.name), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all("picture with a small square" in line for line in lines)
    names: dict[str, Any] = {}
    exec(drawing, names)
    with ShardSet.open("shards") as shards:
        latents = shards.read(0).tensors["latents"].float().numpy()
        rgb = shards.rgb_map()
    assert rgb is not None
    difference = names["draw"](latents).astype(int) - rgb.apply(latents)
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    gc.collect()


def test_files_that_the_readme_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / target).exists(), target
    for name in re.findall(r"^(\S+/|\S+\.py)\s{2,}", text, re.MULTILINE):
        assert (README.parent / name).exists(), name
