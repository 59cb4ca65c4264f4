"""`train` on the tiny model: other ways of training, what is trained on, what is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupt
from random_sets import MakeSettings, random_set

from qwen_lora.config.schema import ShardSource
from qwen_lora.errors import InputError
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train


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
