"""Runs that are stopped in the middle, or shared by two processes, end with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError, Stopped
from qwen_lora.precompute.run import precompute
from qwen_lora.shards import writer

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red fox, sitting", "blue"]
KILL_AT_THE_THIRD_SHARD = """
import os, signal, sys
from qwen_lora.cli import main
from qwen_lora.shards import writer

write_shard, calls = writer.write_shard, []

def third_time_unlucky(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_shard(*arguments)

writer.write_shard = third_time_unlucky
main()
"""


def command(settings: Settings) -> list[str]:
    facts = ["encode_threads", "vae_batch_size", "text_batch_size", "shard_max_samples"]
    line = ["precompute", str(settings.data_config.img_dir), "--output", str(settings.shards_dir)]
    line += ["--model", settings.pretrained_model_name_or_path, "--resolution", "96"]
    for name in facts:
        line += ["--set", f"{name}={getattr(settings, name)}"]
    return [*line, "--set", f"preview_prompts={json.dumps(settings.preview_prompts)}"]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings(make_settings, tmp_path) -> Settings:
    return make_settings(
        shards_dir=tmp_path / "broken", shard_max_samples=2, preview_prompts=PROMPTS
    )


@pytest.fixture
def unbroken(make_settings, tmp_path, published) -> dict[str, bytes]:
    settings = make_settings(
        shards_dir=tmp_path / "unbroken", shard_max_samples=2, preview_prompts=PROMPTS
    )
    precompute(settings)
    files = published(settings.shards_dir)
    assert {"rgb", "previews", "unconditional"} <= {name.split("-")[0] for name in files}
    return files


def test_kill_9_costs_the_shard_in_progress_and_no_byte(settings, unbroken, published):
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AT_THE_THIRD_SHARD, *command(settings)],
        env=environment(),
        timeout=120,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = published(settings.shards_dir)
    assert len([name for name in left if name.endswith(".tar")]) == 2
    assert left.items() <= unbroken.items()
    summary = precompute(settings)
    assert (summary.written, summary.exit_code) == (12, 0)
    assert published(settings.shards_dir) == unbroken


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_whole_shards(settings, unbroken, monkeypatch, signum, published):
    write_shard, calls = writer.write_shard, []

    def signal_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signum)
        return write_shard(*arguments)

    before = signal.getsignal(signum)
    monkeypatch.setattr(writer, "write_shard", signal_at_the_third)
    with pytest.raises(Stopped) as stopped:
        precompute(settings)
    assert stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    left = published(settings.shards_dir)
    assert "manifest.json" not in left
    assert left.items() <= unbroken.items()
    monkeypatch.setattr(writer, "write_shard", write_shard)
    precompute(settings)
    assert published(settings.shards_dir) == unbroken


def fail_at_the_third(monkeypatch, error: OSError) -> None:
    write_shard, calls = writer.write_shard, []

    def write(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return write_shard(*arguments)

    monkeypatch.setattr(writer, "write_shard", write)


@pytest.mark.parametrize("placement", ["together", "sequential"])
def test_a_full_disk_is_one_clear_error_and_the_rest_follows(
    make_settings, tmp_path, unbroken, placement, published
):
    settings = make_settings(
        shards_dir=tmp_path / "broken",
        shard_max_samples=2,
        encoder_placement=placement,
        preview_prompts=PROMPTS,
    )
    with pytest.MonkeyPatch.context() as patch:
        fail_at_the_third(patch, OSError(28, "No space left on device"))
        with pytest.raises(QwenLoraError, match="No space left on device"):
            precompute(settings)
    precompute(settings)
    assert published(settings.shards_dir) == unbroken


def test_a_broken_image_does_not_shift_the_cuts(make_settings, tmp_path, image_folder, published):
    """A shard that lacks an undecodable sample is recognised by a rerun."""
    dataset = tmp_path / "dataset"
    shutil.copytree(image_folder, dataset)
    for name in ("03.png", "07.png"):
        data = (dataset / name).read_bytes()
        (dataset / name).write_bytes(data[: len(data) // 2])

    def settings(name: str) -> Settings:
        data = {"img_dir": dataset}
        return make_settings(data, shards_dir=tmp_path / name, shard_max_samples=3)

    assert precompute(settings("unbroken")).skipped == 2
    with pytest.MonkeyPatch.context() as patch:
        fail_at_the_third(patch, OSError(5, "Input/output error"))
        with pytest.raises(QwenLoraError, match="Input/output error"):
            precompute(settings("broken"))
    summary = precompute(settings("broken"))
    assert (summary.written, summary.skipped) == (10, 2)
    assert published(tmp_path / "broken") == published(tmp_path / "unbroken")


def test_a_run_with_other_cuts_keeps_what_it_can(settings, make_settings, published):
    with pytest.MonkeyPatch.context() as patch:
        fail_at_the_third(patch, OSError(5, "Input/output error"))
        with pytest.raises(QwenLoraError, match="Input/output error"):
            precompute(settings)
    kept = {name for name in published(settings.shards_dir) if name.startswith("shard-")}
    summary = precompute(make_settings(shards_dir=settings.shards_dir, shard_max_samples=5))
    assert (summary.written, summary.samples) == (12, 12)
    assert kept and kept <= set(published(settings.shards_dir))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("launch", "options"),
    [
        ([], ["--num-processes", "2"]),
        pytest.param(
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            [],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_make_the_bytes_of_one(launch, options, settings, unbroken, published):
    done = subprocess.run(
        [sys.executable, *launch, "-m", "qwen_lora", *command(settings), *options],
        env=environment(),
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 files seen") == 1
    assert published(settings.shards_dir) == unbroken


@pytest.mark.multiprocess
def test_an_error_of_one_process_ends_both(settings):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = command(settings)
    line[1] = str(settings.shards_dir / "no-such-dataset")
    done = subprocess.run(
        [sys.executable, *launch, "-m", "qwen_lora", *line],
        env=environment(),
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no-such-dataset" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
