"""Both stages by way of a bucket, as a person types them: a settings file that names the URL."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.shards.manifest import load_manifest
from tests.s3_server import BUCKET, SECRET, S3Server, s3_stand_in

URL = f"s3://{BUCKET}/job/set"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_stand_in() as server:
        yield server


def says(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert SECRET not in result.output
    return result.output


def tensors(run: Path) -> bytes:
    """What follows the header, which says whether shard sets were named on the command line."""
    data = (run / "lora.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_both_stages_by_way_of_a_bucket(
    s3: S3Server,
    tiny_model: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training from the URL is training from a copy of the bucket, and goes on with the generation
    that it started with when the set has grown and was pruned, on a machine without a cache too."""
    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(image_folder.iterdir())[:8]:
        shutil.copy(path, images)
    config = tmp_path / "lora.yaml"
    config.write_text(
        f"""
pretrained_model_name_or_path: {tiny_model}
data_config:
  img_dir: {images}
  img_size: 32
shards_dir: {URL}/
state_dir: {tmp_path / "state"}
output_dir: {tmp_path / "run"}
encode_threads: 1
train_batch_size: 2
checkpointing_steps: 1
rank: 2
""",
        encoding="utf-8",
    )
    assert "4 samples in the set" in says("precompute", "--config", config)
    assert (tmp_path / "state" / "report.jsonl").exists()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in s3.objects("job/set").items():
        (copy / name).write_bytes(data)

    train = ["train", "--config", config, "--max-train-steps"]
    says(*train, "2")
    says(*train, "2", f"{URL}/", "--output", tmp_path / "named")
    says(*train, "2", copy, "--output", tmp_path / "near")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "named") == tensors(tmp_path / "near")

    pinned = load_manifest(URL)[1]
    for path in sorted(image_folder.iterdir())[8:10]:
        shutil.copy(path, images)
    says("precompute", "--config", config)
    assert "0 files removed" in says("shards", "prune", URL)
    shutil.rmtree(tmp_path / "cache")
    says(*train, "4")
    says(*train, "4", copy, "--output", tmp_path / "near")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "near")
    assert load_manifest(URL)[0].previous == pinned
