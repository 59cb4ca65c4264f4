"""The commands one after the other on the tiny model, as a person types them."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from qwen_lora.cli import app


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(
    tiny_model: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A settings file for the tiny model, and the shard set that `precompute` made with it."""
    folder = tmp_path_factory.mktemp("work")
    config = folder / "lora.yaml"
    config.write_text(
        f"""
pretrained_model_name_or_path: {tiny_model}
data_config:
  img_dir: {image_folder}
  img_size: 64
shards_dir: {folder / "shards"}
output_dir: {folder / "run"}
encode_threads: 1
train_batch_size: 2
max_train_steps: 3
learning_rate: 1e-2
lora_targets: all-linear
rank: 4
""",
        encoding="utf-8",
    )
    result = invoke("precompute", "--config", config)
    assert result.exit_code == 0, result.output
    return config, folder / "shards"


def test_a_dry_run_writes_nothing(tiny_model: Path, image_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    result = invoke("precompute", image_folder, "--model", tiny_model, "--output", shards,
                    "--resolution", "64", "--dry-run")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "12" in result.stdout
    assert not list(tmp_path.rglob("*.tar"))


def test_precompute_again_changes_nothing(work: tuple[Path, Path]) -> None:
    config, shards = work
    before = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
    result = invoke("precompute", "--config", config)
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()} == before


def test_info(work: tuple[Path, Path]) -> None:
    _, shards = work
    text = invoke("shards", "info", shards)
    assert text.exit_code == 0 and "12" in text.stdout
    facts = json.loads(invoke("shards", "info", shards, "--json").stdout)
    assert facts["counts"]["samples"] == 12
    assert facts["recipe"]["img_size"] == [64]


# webdataset leaves closing its files to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_list(work: tuple[Path, Path]) -> None:
    _, shards = work
    lines = invoke("shards", "list", shards).stdout.splitlines()
    rows = [
        json.loads(row) for row in invoke("shards", "list", shards, "--json").stdout.splitlines()
    ]
    assert len(lines) == len(rows) == 12
    assert {row["source"] for row in rows} == {f"{number:02d}.png" for number in range(12)}
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row["sample_id"]) and row["captions"][0] in line
    urls = invoke("shards", "list", shards, "--urls").stdout.splitlines()
    keys = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    gc.collect()  # here, and not in the middle of another test
    assert sorted(keys) == sorted(row["sample_id"] for row in rows)


def test_list_shows_hostile_names_as_text() -> None:
    from qwen_lora.cli.shards import _line

    line = _line(
        {
            "sample_id": "0" * 32,
            "bucket": [64, 96],
            "token_counts": [3],
            "captions": ["two\nlines \x1b[31mred"],
            "source": "a\rb.png",
            "source_sha256": "f" * 64,
        }
    )
    assert line.isprintable() and "\\x1b" in line and "64x96" in line


def test_verify_tells_and_exits(work: tuple[Path, Path], tmp_path: Path) -> None:
    _, shards = work
    for flags in ([], ["--deep"]):
        result = invoke("shards", "verify", shards, *flags)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("intact: 12 samples")
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    tar = next(iter(broken.glob("shard-*.tar")))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    result = invoke("shards", "verify", broken)
    assert result.exit_code == 1
    assert result.stdout.startswith("problem: ") and tar.name in result.stdout
    report = json.loads(invoke("shards", "verify", broken, "--json").stdout)
    assert report["ok"] is False and report["problems"]


@pytest.mark.parametrize("command", ["info", "verify", "list"])
def test_no_shard_set_is_exit_2(command: str, tmp_path: Path) -> None:
    result = invoke("shards", command, tmp_path / "nothing")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_shards_commands_load_no_torch(work: tuple[Path, Path]) -> None:
    code = """
import sys
from qwen_lora.cli import app
for arguments in (["info"], ["list"], ["verify", "--deep"]):
    try:
        app(["shards", *arguments, sys.argv[1]], prog_name="qwen-lora")
    except SystemExit as stop:
        assert not stop.code
print("torch" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code, work[1]], capture_output=True, text=True, env=environment
    )
    assert result.stdout.endswith("False\n"), result.stderr


def test_train_and_sample(
    work: tuple[Path, Path], transformer_only: Path, tiny_model: Path
) -> None:
    config, shards = work
    result = invoke("train", shards, "--config", config, "--model", transformer_only)
    assert result.exit_code == 0, result.output
    lora = Path(result.stdout.strip().splitlines()[-1])
    assert lora == shards.parent / "run" / "lora.safetensors"
    assert any(value.abs().max() > 0 for name, value in load_file(lora).items() if "lora_B" in name)
    picture = shards.parent / "picture.png"
    result = invoke(
        "sample", "--model", tiny_model, "--lora", lora.parent, "--prompt", "a red picture",
        "--output", picture, "--steps", "2", "--height", "64", "--width", "64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert picture.is_file()


def test_train_refuses_another_resolution_than_the_shards(work: tuple[Path, Path]) -> None:
    config, shards = work
    result = invoke("train", shards, "--config", config, "--output", shards.parent / "other",
                    "--set", "data_config.img_size=128")  # fmt: skip
    assert result.exit_code == 2
    assert "data_config.img_size is [128]" in result.stderr.splitlines()[-1]


def test_imports_add_no_noise(work: tuple[Path, Path]) -> None:
    """What the libraries log while they are imported does not reach the person."""
    config, _ = work
    done = subprocess.run(
        [sys.executable, "-m", "qwen_lora", "train", "--config", str(config), "--restart"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "starting: 12 samples" in done.stderr
    assert "kernels" not in done.stderr and "Warning" not in done.stderr
