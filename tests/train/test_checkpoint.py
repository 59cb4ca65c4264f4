"""Checkpoints are whole or absent, verified when read, and rotated after publishing."""

import json
import os
from pathlib import Path

import pytest
import torch

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    RunFacts,
    TrainState,
    newest_good,
)

FACTS = RunFacts(
    settings={"learning_rate": 1e-4, "lora_targets": ["to_q", "to_k"]},
    compute_dtype="float32",
    micro_batches_per_step=2,
    plan_id="p" * 64,
    generations=("manifest-0123456789ab.json",),
    fingerprints=("f" * 64,),
    base_model="b" * 64,
)


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        facts=FACTS,
        state=TrainState(
            step=step, epoch=1, epoch_step=2, smoothed_loss=1 / 3, interval_losses=(0.1, 0.2)
        ),
        lora={"a.lora_A": torch.randn(4, 8, generator=generator)},
        optimizer_tensors={"a.lora_A/exp_avg": torch.randn(4, 8, generator=generator)},
        optimizer={"state": {"a.lora_A": {"exp_avg": {"__tensor__": "a.lora_A/exp_avg"}}}},
        scheduler={"last_epoch": step},
        scaler={},
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


def test_what_is_saved_is_loaded(store: CheckpointStore) -> None:
    saved = make(250)
    assert store.save(saved, keep=3).name == "step-00000250"
    loaded = store.load(250)
    assert (loaded.facts, loaded.state) == (saved.facts, saved.state)
    assert (loaded.optimizer, loaded.scheduler) == (saved.optimizer, saved.scheduler)
    torch.testing.assert_close(loaded.lora, saved.lora, rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer_tensors, saved.optimizer_tensors, rtol=0, atol=0)


def test_only_safetensors_and_json(store: CheckpointStore) -> None:
    folder = store.save(make(1), keep=3)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_rotation_keeps_the_newest_and_drops_abandoned_later_ones(store: CheckpointStore) -> None:
    for step in (10, 20, 30, 40):
        store.save(make(step), keep=3)
    assert store.steps() == [20, 30, 40]
    store.save(make(25), keep=3)  # after going back to 20
    assert store.steps() == [20, 25]


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(make(10), keep=3)
    (store.path(10) / "lora.safetensors").write_bytes(b"damaged")
    store.save(make(10), keep=3)
    assert store.load(10).state.step == 10


@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(
    store: CheckpointStore, name: str, damage: str
) -> None:
    store.save(make(10), keep=3)
    store.save(make(20), keep=3)
    path = store.path(20) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        store.load(20)
    found, notes = newest_good(store, "latest")
    assert found is not None and found.state.step == 10
    assert len(notes) == 1 and name in notes[0] and "falling back" in notes[0]


def test_every_flipped_byte_of_the_state_is_noticed(store: CheckpointStore) -> None:
    store.save(make(10), keep=1)
    path = store.path(10) / "state.json"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises((CheckpointError, InputError)):
            store.load(10)


def test_no_sound_checkpoint_is_an_error_and_not_a_new_start(store: CheckpointStore) -> None:
    store.save(make(10), keep=3)
    (store.path(10) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--restart"):
        newest_good(store, "latest")


def test_no_checkpoint_is_a_first_start(store: CheckpointStore) -> None:
    assert newest_good(store, "latest") == (None, [])


def test_a_named_checkpoint(store: CheckpointStore) -> None:
    store.save(make(10), keep=3)
    store.save(make(20), keep=3)
    found, _ = newest_good(store, "step-00000010")
    assert found is not None and found.state.step == 10
    with pytest.raises(InputError, match="step-00000010, step-00000020"):
        newest_good(store, "checkpoint-30")


def test_leftovers_are_no_checkpoints_and_are_swept(store: CheckpointStore) -> None:
    store.save(make(10), keep=3)
    for name in (".new-abc", ".old-abc"):
        (store.folder / name).mkdir()
        (store.folder / name / "lora.safetensors").write_bytes(b"half")
    assert store.steps() == [10]
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_earlier_checkpoints(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.save(make(10), keep=1)
    before = {path: path.read_bytes() for path in store.path(10).iterdir()}

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(QwenLoraError, match="No space left"):
            store.save(make(20), keep=1)
    assert store.steps() == [10]
    assert {path: path.read_bytes() for path in store.path(10).iterdir()} == before
    assert [path.name for path in store.folder.iterdir()] == ["step-00000010"]


def test_a_newer_format_is_refused(store: CheckpointStore) -> None:
    store.save(make(10), keep=1)
    path = store.path(10) / "state.json"
    from qwen_lora.hashing import canonical_json, hash_json

    state = json.loads(path.read_bytes())
    del state["sha256"]
    state["format"] = 99
    path.write_bytes(canonical_json({**state, "sha256": hash_json(state)}))
    with pytest.raises(InputError, match="format 99"):
        store.load(10)
