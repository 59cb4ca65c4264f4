"""One rank and two: the same steps, the same LoRA; signals and faults end both ranks together."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_sets import MakeSettings, random_map, random_prompts, random_set
from safetensors.torch import load_file

from qwen_lora.errors import InputError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.checkpoint import CheckpointStore, TrainState
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.loop import upcoming
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.plan import BatchRule, PlanTable
from qwen_lora.train.run import train
from qwen_lora.train.timesteps import TimestepSampling

pytestmark = pytest.mark.multiprocess
REPOSITORY = Path(__file__).resolve().parents[2]


def start(output: Path, shards: Path, model: Path, processes: int, **changes: Any) -> Any:
    values = {
        "rank": 4,
        "max_train_steps": 20,
        "train_batch_size": 2,
        "checkpointing_steps": 100,
        "validation_steps": 0,
        "gradient_checkpointing": "false",
        "logging_steps": 1,
        **changes,
    }
    command = [sys.executable, "-m", "qwen_lora", "train", str(shards), "--model", str(model)]
    command += ["--output", str(output), "--num-processes", str(processes)]
    command += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def distance(one: Path, other: Path) -> float:
    """Relative L2 distance of two LoRA files as vectors."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    difference = sum(float((a[key] - b[key]).double().square().sum()) for key in a)
    total = sum(float(b[key].double().square().sum()) for key in b)
    return float((difference / total) ** 0.5)


def test_ranks_share_the_same_global_batches(train_shards: Path) -> None:
    """Every tensor of every step of three epochs, from one, two and three ranks."""
    with ShardSet.open(train_shards) as shard_set:
        table = PlanTable.from_sets([shard_set])
        rule = BatchRule(train_batch_size=2, micro_batches_per_step=6, seed=0)
        loader = BatchLoader([shard_set], table, rule, TimestepSampling())

        def steps(world: int) -> list[dict[int, Any]]:
            """Per step: number of the micro-batch -> its batch, gathered over the ranks."""
            streams = [
                upcoming(
                    SimpleNamespace(loader=loader, ranks=SimpleNamespace(rank=rank, world=world)),  # type: ignore[arg-type]
                    TrainState(),
                )
                for rank in range(world)
            ]
            gathered = []
            for _ in range(6):
                works = [next(stream) for stream in streams]
                assert len({len(work.micro_steps) for work in works}) == 1
                micro_steps = [micro for work in works for micro in work.micro_steps]
                gathered.append({m.index: m.batch for m in micro_steps if m.weight})
                assert sum(m.batch.size for m in micro_steps if m.weight) == works[0].samples
            for stream in streams:
                stream.close()
            return gathered

        expected = steps(1)
        for world in (2, 3):
            for one, other in zip(expected, steps(world), strict=True):
                assert one.keys() == other.keys()
                for number in one:
                    assert one[number].sample_ids == other[number].sample_ids
                    for name in ("latents", "noise", "sigmas", "prompt_embeds"):
                        torch.testing.assert_close(
                            getattr(one[number], name), getattr(other[number], name), rtol=0, atol=0
                        )


def test_two_ranks_end_with_the_same_lora(
    make_settings: MakeSettings, train_shards: Path, transformer_only: Path, tmp_path: Path
) -> None:
    """20 steps at 1e-4 with dropout: accumulation 2 on one rank, 1 on two; 5 micro-batches in an
    epoch, so that a rank is without work at the end of each."""
    two = start(
        tmp_path / "two", train_shards, transformer_only, 2, learning_rate=1e-4, lora_dropout=0.1
    )
    changes = {"learning_rate": 1e-4, "lora_dropout": 0.1, "logging_steps": 1}
    one = train(make_settings("one", gradient_accumulation_steps=2, **changes))
    output, _ = two.communicate(timeout=120)
    assert two.returncode == 0, output
    assert distance(tmp_path / "two" / "lora.safetensors", one.lora) < 1e-5
    states = [CheckpointStore(tmp_path / name).load(20).state for name in ("one", "two")]
    assert states[0].samples == states[1].samples
    assert states[0].smoothed_loss == pytest.approx(states[1].smoothed_loss, rel=1e-5)
    losses = [loss_curve(tmp_path / name) for name in ("one", "two")]
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Adam hides a wrong scale of the gradient; its norm does not.
    norms = [gradient_norms(tmp_path / name) for name in ("one", "two")]
    assert norms[0] == pytest.approx({step: norms[1][step] for step in norms[0]}, rel=1e-4)


def test_sigterm_saves_and_the_run_goes_on_with_another_number_of_ranks(
    make_settings: MakeSettings, train_shards: Path, transformer_only: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = start(run, train_shards, transformer_only, 2, max_train_steps=100_000)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, output
    assert output.count("stopped at step") == 1
    assert not processes_that_mention(str(run))
    (step,) = CheckpointStore(run).steps()
    assert step >= 3

    changes = {"max_train_steps": step + 2, "learning_rate": 1e-4}
    resumed = train(make_settings("run", **changes))  # accumulation becomes 2
    unbroken = train(make_settings("one", gradient_accumulation_steps=2, **changes))
    assert (resumed.resumed_from, resumed.steps) == (step, step + 2)
    assert distance(resumed.lora, unbroken.lora) < 1e-4


def test_a_fault_of_one_rank_ends_both_with_its_message(
    train_shards: Path, transformer_only: Path, tmp_path: Path
) -> None:
    """A record that only one rank reads in the first step is damaged."""
    import shutil

    shards = tmp_path / "damaged"
    shutil.copytree(train_shards, shards)
    for tar in shards.glob("shard-*.tar"):
        data = bytearray(tar.read_bytes())
        data[data.index(b".safetensors") + 512 + 700] ^= 1  # the first record's tensors
        tar.write_bytes(data)
    run = start(tmp_path / "run", shards, transformer_only, 2, train_batch_size=1)
    output, _ = run.communicate(timeout=90)
    assert run.returncode == 1
    assert re.findall("^error: .*sample [0-9a-f]{32}", output, re.MULTILINE), output
    assert output.count("error: ") == 1 and "Traceback" not in output


def test_ranks_that_cannot_share_a_step_are_refused(make_settings: MakeSettings) -> None:
    from qwen_lora.train.checkpoint import RunFacts
    from qwen_lora.train.resume import result_settings, share_of_step

    settings = make_settings(gradient_accumulation_steps=3)
    recorded = RunFacts(result_settings(settings), "float32", 12, "p", (), (), "b")
    assert share_of_step(None, settings, 4) == (12, 3)
    assert share_of_step(recorded, settings, 2) == (12, 6)
    assert share_of_step(recorded, make_settings(gradient_accumulation_steps=12), 1) == (12, 12)
    with pytest.raises(InputError, match="12 micro-batches.*: 1, 2, 3, 4, 6, 12$"):
        share_of_step(recorded, settings, 5)
    with pytest.raises(InputError, match="was 3, now 4"):
        share_of_step(recorded, make_settings(gradient_accumulation_steps=4), 1)


def gradient_norms(run: Path) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row["grad_norm"] for row in rows if "grad_norm" in row}


def loss_curve(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def processes_that_mention(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in words and "qwen_lora" in words:
            found.append(words)
    return found


def test_two_ranks_draw_the_pictures_of_one(
    make_settings: MakeSettings, transformer_only: Path, tmp_path: Path
) -> None:
    """Three prompts, so that a rank is without one; LoRAs of one and two ranks differ in the last
    bits, and so may a pixel."""
    shards = random_set(
        tmp_path / "shards", 6, rgb=random_map(), prompts=random_prompts(["one", "two", "three"])
    )
    drawn = {
        "preview_inference_steps": 2,
        "preview_steps": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-4,
    }
    two = start(tmp_path / "two", shards, transformer_only, 2, **drawn)
    train(make_settings("one", shards_dir=shards, gradient_accumulation_steps=2, **drawn))
    output, _ = two.communicate(timeout=120)
    assert two.returncode == 0, output
    assert output.count("drawing 3 previews at step 4") == 1
    names = [f"step-{step:06d}/{number:03d}.png" for step in (0, 4) for number in range(3)]
    for name in names:
        one, other = (
            np.asarray(Image.open(tmp_path / run / "previews" / name)).astype(int)
            for run in ("one", "two")
        )
        assert one.std() > 1
        assert np.abs(one - other).max() <= (0 if name.startswith("step-000000") else 2), name
