"""`train` from end to end on the tiny model: resume, refusals, faults, measurements."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from random_sets import MakeSettings, random_set
from safetensors.torch import load_file

from qwen_lora.config.schema import Settings, ShardSource
from qwen_lora.errors import InputError, QwenLoraError, ShardError, Stopped
from qwen_lora.posix import exclusive_lock
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train
from qwen_lora.train.step import SampleLosses, Stepper


@contextmanager
def signal_after(steps: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Sends this process a signal while its `steps`-th step from here on is running."""
    original, done = Stepper.run, 0

    def run(self: Stepper, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", run)
        yield


def interrupt(settings: Settings, steps: int, number: int = signal.SIGTERM) -> None:
    with signal_after(steps, number), pytest.raises(Stopped) as stopped:
        train(settings)
    assert stopped.value.exit_code == 128 + number


def checkpoint_bytes(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in CheckpointStore(folder).path(step).iterdir()}


# ---- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.1, "lr_scheduler": "cosine", "lr_warmup_steps": 3},
        {"gradient_accumulation_steps": 2, "data_caption_dropout_rate": 0.5, "max_grad_norm": 0},
    ],
    ids=["plain", "dropout-cosine", "accumulation"],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    make_settings: MakeSettings, changes: dict[str, Any]
) -> None:
    """20 steps = 8, an interrupt, 3, an interrupt and 9 more, to the last bit."""
    unbroken = train(make_settings("unbroken", **changes))
    broken = make_settings("broken", **changes)
    interrupt(broken, 8)
    assert CheckpointStore(broken.output_dir).steps() == [5, 8]
    assert not (broken.output_dir / "lora.safetensors").exists()
    interrupt(broken, 3, signal.SIGINT)
    resumed = train(broken)
    assert (unbroken.steps, resumed.steps, resumed.resumed_from) == (20, 20, 11)
    assert resumed.lora.read_bytes() == unbroken.lora.read_bytes()
    expected = checkpoint_bytes(unbroken.lora.parent, 20)
    assert checkpoint_bytes(resumed.lora.parent, 20) == expected
    rows = [read_metrics(result.lora.parent / "metrics.jsonl") for result in (unbroken, resumed)]
    of_the_clock = ("step_seconds", "samples_per_s", "data_wait_seconds", "peak_rss_gib")
    timeless = [
        [{k: v for k, v in row.items() if k not in of_the_clock} for row in r] for r in rows
    ]
    assert timeless[0] == timeless[1]


def test_read_ahead_changes_nothing(make_settings: MakeSettings) -> None:
    results = [
        train(make_settings(f"ahead{count}", read_ahead=count, max_train_steps=7))
        for count in (0, 9)
    ]
    assert results[0].lora.read_bytes() == results[1].lora.read_bytes()


def test_a_finished_run_says_so_and_can_be_made_longer(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(make_settings(max_train_steps=6))
    before = first.lora.read_bytes()
    again = train(make_settings(max_train_steps=6))
    assert again.already_done and again.steps == 6 and again.lora.read_bytes() == before
    assert "is done: 6 steps" in capsys.readouterr().err
    longer = train(make_settings(max_train_steps=9))
    assert (longer.steps, longer.resumed_from) == (9, 6)
    whole = train(make_settings("whole", max_train_steps=9))
    assert load_file(longer.lora).keys() == load_file(whole.lora).keys()
    torch.testing.assert_close(load_file(longer.lora), load_file(whole.lora), rtol=0, atol=0)


def test_a_lost_lora_file_is_written_again(make_settings: MakeSettings) -> None:
    first = train(make_settings(max_train_steps=4))
    before = first.lora.read_bytes()
    first.lora.write_bytes(before[:-1])
    again = train(make_settings(max_train_steps=4))
    assert not again.already_done and again.lora.read_bytes() == before


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(make_settings("unbroken", max_train_steps=12)).lora.read_bytes()
    settings = make_settings(max_train_steps=12)
    interrupt(settings, 8)
    damaged = CheckpointStore(settings.output_dir).path(8) / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    result = train(settings)
    assert result.resumed_from == 5
    assert "step-00000008/optimizer.safetensors is damaged" in capsys.readouterr().err
    assert result.lora.read_bytes() == expected


def test_rotation(make_settings: MakeSettings) -> None:
    settings = make_settings(max_train_steps=9, checkpointing_steps=2, checkpoints_total_limit=2)
    train(settings)
    assert CheckpointStore(settings.output_dir).steps() == [8, 9]


def test_restart_forgets_the_run_and_nothing_else(make_settings: MakeSettings) -> None:
    settings = make_settings(max_train_steps=4)
    train(settings)
    (settings.output_dir / "notes.txt").write_text("mine")
    result = train(make_settings(max_train_steps=3, learning_rate=5e-4), restart=True)
    assert (result.steps, result.resumed_from) == (3, None)
    assert CheckpointStore(settings.output_dir).steps() == [3]
    assert (settings.output_dir / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, now 0.002"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"rank": 8}, "rank was 4, now 8"),
        ({"train_batch_size": 1}, "train_batch_size was 2, now 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1, now 2"),
        ({"data_caption_dropout_rate": 0.3}, "caption_dropout_rate was 0.1, now 0.3"),
        ({"mixed_precision": "bf16"}, "was float32, now bfloat16"),
        ({"data_group_weights": {"": 2.0}}, r"group_weights was {}, now {'': 2.0}"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler was 'constant', now 'cosine'"),
    ],
)
def test_a_change_of_the_result_is_refused_naming_old_and_new(
    make_settings: MakeSettings, stopped_run: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train(make_settings(**{**changes, "output_dir": stopped_run}))


@pytest.fixture(scope="module")
def stopped_run(
    train_shards: Path, transformer_only: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with one checkpoint of 20 steps; refused continuations must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    settings = Settings(
        shards_dir=train_shards,
        pretrained_model_name_or_path=str(transformer_only),
        output_dir=folder,
        rank=4,
        train_batch_size=2,
        learning_rate=1e-3,
        max_train_steps=20,
        validation_steps=0,
        gradient_checkpointing=False,
    )
    interrupt(settings, 2)
    return folder


def test_changed_weights_of_shard_sets_are_refused(
    make_settings: MakeSettings, stopped_run: Path, train_shards: Path
) -> None:
    same = make_settings(output_dir=stopped_run, max_train_steps=2, shards=[{"path": train_shards}])
    with pytest.raises(InputError, match=r"weights of shards were \[1.0\], now \[3.0\]"):
        train(same.model_copy(update={"shards": [ShardSource(path=train_shards, weight=3.0)]}))


def test_all_changes_are_named_together(make_settings: MakeSettings, stopped_run: Path) -> None:
    with pytest.raises(InputError) as refused:
        train(make_settings(output_dir=stopped_run, seed=3, learning_rate=1.0))
    assert "seed was 0, now 3" in str(refused.value)
    assert "learning_rate was 0.001, now 1.0" in str(refused.value)


def test_a_schedule_that_depends_on_the_length_keeps_it(make_settings: MakeSettings) -> None:
    interrupt(make_settings(lr_scheduler="cosine"), 2)
    with pytest.raises(InputError, match="max_train_steps was 20, now 30"):
        train(make_settings(lr_scheduler="cosine", max_train_steps=30))


def test_a_run_does_not_get_shorter_than_it_is(make_settings: MakeSettings) -> None:
    interrupt(make_settings(), 3)
    with pytest.raises(InputError, match="max_train_steps is 2, and 3 steps are done"):
        train(make_settings(max_train_steps=2))
    assert train(make_settings(max_train_steps=3)).steps == 3


def test_another_base_model_is_refused(
    make_settings: MakeSettings, stopped_run: Path, transformer_only: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import save_file

    other = tmp_path / "other-model"
    shutil.copytree(transformer_only, other)
    (weights,) = (other / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["img_in.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(InputError, match="base model's content"):
        train(make_settings(output_dir=stopped_run, pretrained_model_name_or_path=str(other)))


def test_later_appends_do_not_disturb_a_run(make_settings: MakeSettings, tmp_path: Path) -> None:
    shards = random_set(tmp_path / "growing", 6)
    expected = train(make_settings("unbroken", shards_dir=shards, max_train_steps=8))
    settings = make_settings(shards_dir=shards, max_train_steps=8)
    interrupt(settings, 3)
    (first,) = shards.glob("manifest-*.json")
    random_set(shards, 9)
    assert train(settings).lora.read_bytes() == expected.lora.read_bytes()

    settings = make_settings("pinned", shards_dir=shards, max_train_steps=8)
    interrupt(settings, 3)  # pinned to the new generation
    (second,) = set(shards.glob("manifest-*.json")) - {first}
    second.unlink()
    random_set(shards, 7)
    with pytest.raises(InputError, match="hold other samples than manifest-"):
        train(settings)


# ---- faults ----------------------------------------------------------------------------------


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


# ---- data and measurements -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
@pytest.mark.parametrize(
    "changes",
    [
        {
            "optimizer": "adamw8bit",
            "lr_scheduler": "piecewise_constant",
            "lr_step_rules": "1:3,0.1",
        },
        {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant_with_warmup"},
        {"optimizer": "torch.optim.Adagrad", "lr_scheduler": "linear"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "lora_targets": "all-linear"},
        {"lora_init": "orthogonal", "use_rslora": True, "timestep_sampling": "logit_normal"},
    ],
    ids=["adamw8bit", "prodigy", "adagrad", "bf16", "rslora"],
)
def test_other_ways_of_training_resume_to_the_bit_too(
    make_settings: MakeSettings, changes: dict[str, Any]
) -> None:
    needs = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
    pytest.importorskip(needs.get(changes.get("optimizer", ""), "torch"))
    expected = train(make_settings("unbroken", **changes, max_train_steps=7)).lora.read_bytes()
    settings = make_settings("broken", **changes, max_train_steps=7)
    interrupt(settings, 4)
    assert train(settings).lora.read_bytes() == expected


def test_wrong_optimizer_settings_are_refused_before_a_weight_is_loaded(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_lora.train import assemble

    monkeypatch.delattr(assemble, "load_base")
    with pytest.raises(InputError, match="momentumm"):
        train(make_settings(optimizer="torch.optim.SGD", optimizer_args={"momentumm": 0.9}))
    with pytest.raises(InputError, match="lr_scheduler piecewise_constant"):
        train(make_settings(lr_scheduler="piecewise_constant", lr_step_rules="1:x,0.1"))


def test_neither_encoder_is_ever_made(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `transformer_only` has no folder of theirs."""
    import diffusers
    import transformers

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("training must not construct an encoder")

    monkeypatch.setattr(diffusers.AutoencoderKLQwenImage, "__init__", refuse)
    for name in ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel", "Qwen2Tokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "__init__", refuse)
    settings = make_settings(max_train_steps=2)
    names = {path.name for path in Path(str(settings.pretrained_model_name_or_path)).iterdir()}
    assert names == {"transformer", "scheduler", "model_index.json"}
    assert train(settings).lora.exists()


def test_a_step_is_the_mean_over_its_samples_however_they_are_batched(
    make_settings: MakeSettings,
) -> None:
    """An epoch of 9 samples as one step: 9 micro-batches of 1, 5 of up to 2, 4 of up to 3. Samples
    alone are the same everywhere, so loss and gradient must be, too."""
    rows = []
    for size, count in ((1, 9), (2, 5), (3, 4)):
        settings = make_settings(
            f"by{size}",
            train_batch_size=size,
            gradient_accumulation_steps=count,
            max_train_steps=2,
            logging_steps=1,
        )
        state = CheckpointStore(train(settings).lora.parent).load(2).state
        assert (state.epoch, state.epoch_step, state.samples) == (2, 0, 18)
        rows.append(
            [
                (row["loss"], row["grad_norm"])
                for row in read_metrics(settings.output_dir / "metrics.jsonl")
            ]
        )
    for other in rows[1:]:
        assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in rows[0]], rel=1e-5)
        assert [norm for _, norm in other] == pytest.approx([norm for _, norm in rows[0]], rel=1e-4)


def test_only_the_lora_changes(make_settings: MakeSettings) -> None:
    result = train(make_settings(max_train_steps=3))
    lora = CheckpointStore(result.lora.parent).load(3).lora
    assert lora and all("lora_" in name for name in lora)
    assert all(tensor.dtype == torch.float32 for tensor in lora.values())
    assert all(bool(tensor.any()) for tensor in lora.values())


def test_several_sets_with_weights(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Weights 2 and 0.5 over 4 and 9 samples, 4 of which are in both: the first set's count."""
    first, second = random_set(tmp_path / "a", 4), random_set(tmp_path / "b", 9)
    sources = [ShardSource(path=first, weight=2.0), ShardSource(path=second, weight=0.5)]
    settings = make_settings(shards=sources, train_batch_size=1, max_train_steps=21)
    result = train(settings)
    state = CheckpointStore(settings.output_dir).load(result.steps).state
    # Two epochs are 2 x 4 x 2 visits of the first set and 5 of the second, whichever epoch.
    assert (state.epoch, state.epoch_step) == (2, 0)
    assert state.samples == 21


def test_sets_of_different_encoders_do_not_mix(
    make_settings: MakeSettings, train_shards: Path, tmp_path: Path
) -> None:
    other = random_set(tmp_path / "other", 4, vae="another")
    sources = [ShardSource(path=train_shards), ShardSource(path=other)]
    with pytest.raises(InputError, match="same VAE"):
        train(make_settings(shards=sources))


def test_validation_on_held_out_images(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """At step 0, on the way and at the end; at step 0 the same for every seed and batch size."""
    starts = []
    for seed in (0, 1):
        settings = make_settings(
            f"seed{seed}", seed=seed, validation_fraction=0.3, validation_steps=3, max_train_steps=7
        )
        train(settings)
        rows = read_metrics(settings.output_dir / "metrics.jsonl")
        measured = {row["step"]: row for row in rows if "validation_loss" in row}
        assert sorted(measured) == [0, 3, 6, 7]
        assert not any("fixed_train_loss" in row for row in rows)
        starts.append({k: v for k, v in measured[0].items() if k != "epoch"})
        assert measured[7]["validation_loss"] != measured[0]["validation_loss"]
    assert starts[0] == starts[1]
    assert {"validation_loss_at_0.1", "validation_loss_at_0.9"} <= starts[0].keys()
    said = capsys.readouterr().err
    assert "of 9 images" in said and "noisy validation loss" in said


def test_without_a_split_fixed_training_images_are_measured(make_settings: MakeSettings) -> None:
    settings = make_settings(validation_steps=5, max_train_steps=5)
    train(settings)
    rows = read_metrics(settings.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "fixed_train_loss" in row] == [0, 5]
    assert not any("validation_loss" in row for row in rows)


def test_what_a_run_leaves(make_settings: MakeSettings) -> None:
    settings = make_settings(max_train_steps=5, logging_steps=2, validation_steps=5)
    result = train(settings)
    names = {path.name for path in settings.output_dir.iterdir() if path.name[0] != "."}
    assert names == {
        "checkpoints",
        "lora.safetensors",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "settings.yaml",
    }
    rows = [row for row in read_metrics(settings.output_dir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    keys = {"epoch", "smoothed_loss", "learning_rate", "grad_norm", "step_seconds", "samples_per_s"}
    keys |= {"data_wait_seconds", "peak_rss_gib"}
    assert all(keys <= row.keys() for row in rows)
    assert all(0 <= row["data_wait_seconds"] <= row["step_seconds"] for row in rows)
    assert json.loads((settings.output_dir / "result.json").read_text())["step"] == 5
    assert str(settings.output_dir) not in result.lora.read_bytes().decode("latin-1")


# ---- faults around a run -----------------------------------------------------------------------


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
