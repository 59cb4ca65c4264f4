"""What goes wrong in and around a run of `train`: one line that says what, and nothing lost."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from random_sets import MakeSettings, random_set

from qwen_lora.config.schema import ShardSource
from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.posix import exclusive_lock
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train
from qwen_lora.train.step import SampleLosses


def test_a_loss_that_is_not_finite_names_step_and_samples(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(max_train_steps=9, checkpointing_steps=2)
    original, calls, names = SampleLosses.forward, 0, []

    def forward(self: SampleLosses, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = original(self, batch)
        if calls == 4:
            names.append(batch.sample_ids[0])
            return losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1))
        return losses

    monkeypatch.setattr(SampleLosses, "forward", forward)
    with pytest.raises(QwenLoraError, match=r"step 4: .*not finite") as failed:
        train(settings)
    assert f"Samples: {names[0]}." in str(failed.value)
    assert CheckpointStore(settings.output_dir).steps() == [2]
    monkeypatch.undo()
    expected = train(make_settings("unbroken", max_train_steps=9)).lora.read_bytes()
    assert train(settings).lora.read_bytes() == expected


def test_a_damaged_record_stops_the_run(make_settings: MakeSettings, tmp_path: Path) -> None:
    shards = random_set(tmp_path / "damaged", 6)
    tar = max(shards.glob("shard-*.tar"))
    data = bytearray(tar.read_bytes())
    position = data.index(b".safetensors") + 512 + 700  # inside a tensor member
    data[position] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError):
        train(make_settings(shards_dir=shards))


def test_fp16_keeps_its_scaler_and_skips_overflows(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that overflows is tried again with half the scale; it is no step."""
    settings = make_settings(mixed_precision="fp16", max_train_steps=4, checkpointing_steps=2)
    original, calls = SampleLosses.forward, 0

    def forward(self: SampleLosses, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, batch) * (float("inf") if calls in (2, 3) else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(SampleLosses, "forward", forward)
        train(settings)
    store = CheckpointStore(settings.output_dir)
    assert store.load(4).scaler["scale"] == 65536.0 / 4
    assert calls == 6
    with monkeypatch.context() as patch:
        patch.setattr(SampleLosses, "forward", lambda s, b: original(s, b) * float("inf"))
        with pytest.raises(QwenLoraError, match="in 20 attempts in a row"):
            train(make_settings(mixed_precision="fp16", max_train_steps=6))
    assert store.steps() == [2, 4]


def test_a_second_start_is_refused_naming_the_first(make_settings: MakeSettings) -> None:
    settings = make_settings()
    with exclusive_lock(settings.output_dir / ".lock", "it"):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            train(settings)


def test_a_tracker_that_is_not_installed_names_its_extra(make_settings: MakeSettings) -> None:
    pytest.importorskip("torch")
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"qwen-lora\[wandb\]"):
            train(make_settings(report_to=["wandb"]))
    else:
        pytest.skip("wandb is installed")


def test_tensorboard_gets_the_numbers(make_settings: MakeSettings) -> None:
    pytest.importorskip("tensorboard")
    settings = make_settings(report_to=["tensorboard"], max_train_steps=2, logging_steps=1)
    train(settings)
    assert list((settings.output_dir / "logs").rglob("events.out.tfevents*"))


def test_a_result_without_its_checkpoints_is_not_overwritten(make_settings: MakeSettings) -> None:
    result = train(make_settings(max_train_steps=2))
    before = result.lora.read_bytes()
    shutil.rmtree(result.lora.parent / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint to continue from.*--restart"):
        train(make_settings(max_train_steps=3))
    assert result.lora.read_bytes() == before
    assert (result.lora.parent / "metrics.jsonl").exists()
    assert train(make_settings(max_train_steps=3), restart=True).steps == 3


def test_a_measure_that_is_not_finite_is_null_and_said(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = SampleLosses.forward

    def forward(self: SampleLosses, batch: Any) -> torch.Tensor:
        losses = original(self, batch)
        return losses if torch.is_grad_enabled() else losses * float("nan")

    monkeypatch.setattr(SampleLosses, "forward", forward)
    result = train(make_settings(max_train_steps=2, validation_steps=1))
    rows = read_metrics(result.lora.parent / "metrics.jsonl")
    measured = [row for row in rows if "fixed_train_loss" in row]
    assert [row["step"] for row in measured] == [0, 1, 2]
    assert all(row["fixed_train_loss"] is None for row in measured)
    assert "fixed_train_loss is not finite at step 1" in capsys.readouterr().err
    assert (result.lora.parent / "loss.png").exists()


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(max_train_steps=10, logging_steps=7)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
        with pytest.raises(QwenLoraError, match=r"metrics\.jsonl.*No space left"):
            train(settings)
    assert CheckpointStore(settings.output_dir).steps() == [5]
    result = train(settings)
    losses = [row["step"] for row in read_metrics(result.lora.parent / "metrics.jsonl")]
    assert (result.resumed_from, losses) == (5, [7, 10])


def test_a_result_that_cannot_be_written_ends_in_one_line(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qwen_lora.train.export.write_atomic", full)
        with pytest.raises(QwenLoraError, match="cannot write the results.*checkpoints are intact"):
            train(make_settings(max_train_steps=2))
    assert train(make_settings(max_train_steps=2)).resumed_from == 2


def test_accelerate_s_environment_does_not_change_the_gradient(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(make_settings("plain", max_train_steps=2, max_grad_norm=0))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    other = train(make_settings("other", max_train_steps=2, max_grad_norm=0))
    norms = [
        [row["grad_norm"] for row in read_metrics(result.lora.parent / "metrics.jsonl")]
        for result in (plain, other)
    ]
    assert norms[0] == norms[1] and norms[0]


def test_another_kind_of_parallelism_is_refused(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="configured for DeepSpeed"):
        train(make_settings(max_train_steps=1))


def test_weights_that_never_give_a_sample_are_refused(
    make_settings: MakeSettings, train_shards: Path
) -> None:
    sources = [ShardSource(path=train_shards, weight=1e-9)]
    with pytest.raises(InputError, match="visits an epoch; raise them"):
        train(make_settings(shards_dir="shards", shards=sources, max_train_steps=1))
