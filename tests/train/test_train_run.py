"""`train` from end to end on the tiny model: resume to the last bit, and what may not change."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupt
from random_sets import MakeSettings, random_set
from safetensors.torch import load_file

from qwen_lora.config.schema import Settings, ShardSource
from qwen_lora.errors import InputError
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.run import train


def checkpoint_bytes(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in CheckpointStore(folder).path(step).iterdir()}


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
