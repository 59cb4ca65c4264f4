"""Shards, base model and checkpoint changed between a run and its resume."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.hashing import canonical_json, hash_json
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.merge import merge
from qwen_lora.shards.prune import prune
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.writer import build_manifest, publish_manifest, write_retired
from qwen_lora.train.checkpoint import Checkpoint, CheckpointStore
from qwen_lora.train.run import train
from tests.resume.runs import timeless
from tests.train.random_sets import random_set

STOP, LAST = 3, 7


@pytest.fixture
def make(base: dict[str, Any], tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a run in tmp_path / output."""

    def settings(output: str, **changes: Any) -> Settings:
        fixed = {"max_train_steps": LAST, "checkpointing_steps": STOP}
        return Settings(**{**base, **fixed, "output_dir": tmp_path / output, **changes})

    return settings


def stop_at_three(run: Path) -> CheckpointStore:
    """Turn a finished run into one that was stopped after the checkpoint of step 3."""
    store = CheckpointStore(run)
    for step in store.steps():
        if step > STOP:
            shutil.rmtree(store.path(step))
    for name in ("lora.safetensors", "result.json"):
        (run / name).unlink()
    return store


def trained(run: Path) -> dict[str, bytes]:
    """What was trained: the last checkpoint's tensors."""
    folder = CheckpointStore(run).path(LAST)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def retire(folder: Path, count: int) -> None:
    """A new generation without the first samples."""
    manifest, newest = load_manifest(folder)
    with ShardSet.open(folder) as shards:
        gone = sorted(shards.table.sample_id)[:count]
    retired = write_retired(folder, gone)
    facts = {
        name: getattr(manifest, name)
        for name in ("shards", "fingerprint", "latent_channels", "latent_scale", "text_width")
        + ("posterior", "model", "recipe", "unconditional")
    }
    publish_manifest(folder, build_manifest(folder, **facts, retired=retired, previous=newest))


def moved(shards: Path) -> Path:
    return shards.rename(shards.with_name("elsewhere"))


def resharded(shards: Path) -> Path:
    with ShardSet.open(shards) as old:
        first = len(old)
    shutil.rmtree(shards)
    return random_set(shards, first, per_shard=2)


def merged(shards: Path) -> Path:
    output = shards.with_name("merged")
    merge([shards], output)
    shutil.rmtree(shards)
    return output


def pruned(shards: Path) -> Path:
    before = {path.name for path in shards.glob("manifest-*.json")}
    prune(shards, everything=True)
    assert not before & {path.name for path in shards.glob("manifest-*.json")}
    return shards


@pytest.mark.parametrize("change", [moved, resharded, merged, pruned])
def test_other_generations_of_the_same_samples_go_on_to_the_bit(
    make: Callable[..., Settings],
    tmp_path: Path,
    change: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = random_set(tmp_path / "shards", 9)
    if change is not resharded:
        retire(shards, 2)
    expected = trained(train(make("run", shards_dir=shards)).lora.parent)
    stop_at_three(tmp_path / "run")
    result = train(make("run", shards_dir=change(shards)))
    assert result.resumed_from == STOP
    assert trained(result.lora.parent) == expected
    gone = "which this run started with, cannot be opened" in capsys.readouterr().err
    assert gone == (change is not moved)


def test_going_back_to_an_earlier_checkpoint_ends_with_the_same_bytes(
    make: Callable[..., Settings], tmp_path: Path
) -> None:
    """Of a finished run; what came after that checkpoint is made again."""
    run = train(make("run", logging_steps=1, validation_steps=2)).lora.parent
    expected, rows = trained(run), timeless(run)
    again = train(
        make("run", resume_from_checkpoint=f"step-{STOP:08d}", logging_steps=1, validation_steps=2)
    )
    assert again.resumed_from == STOP
    assert (trained(run), timeless(run)) == (expected, rows)


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_other_samples_are_refused_where_the_generation_is_gone(
    make: Callable[..., Settings], tmp_path: Path, shuffle: str
) -> None:
    """With `shuffle: block` the shards matter too, and the message says so."""
    shards = random_set(tmp_path / "shards", 9)
    train(make("run", shards_dir=shards, shuffle=shuffle))
    store = stop_at_three(tmp_path / "run")
    _, generation = load_manifest(shards)
    if shuffle == "block":
        resharded(shards)
    else:
        retire(shards, 1)
        prune(shards, everything=True)
    with pytest.raises(InputError, match="hold other samples") as refused:
        train(make("run", shards_dir=shards, shuffle=shuffle))
    assert generation in str(refused.value)
    assert ("in other shards (shuffle: block" in str(refused.value)) == (shuffle == "block")
    assert store.steps() == [STOP]


def test_a_shard_that_is_gone_or_cut_ends_the_resume_before_a_step(
    make: Callable[..., Settings], tmp_path: Path
) -> None:
    shards = random_set(tmp_path / "shards", 9)
    train(make("run", shards_dir=shards))
    store = stop_at_three(tmp_path / "run")
    tar = max(shards.glob("shard-*.tar"))
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=tar.name):
        train(make("run", shards_dir=shards))
    tar.unlink()
    with pytest.raises(ShardError, match=tar.name):
        train(make("run", shards_dir=shards))
    assert store.steps() == [STOP]


def test_the_scheduler_s_shift_matters_where_it_is_used(
    make: Callable[..., Settings], tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    for name in ("transformer", "scheduler"):
        shutil.copytree(tiny_model / name, model / name)
    shutil.copy(tiny_model / "model_index.json", model)
    common = {"pretrained_model_name_or_path": str(model)}
    expected = trained(train(make("without", **common)).lora.parent)
    train(make("with", timestep_shift="model", **common))
    stop_at_three(tmp_path / "without")
    store = stop_at_three(tmp_path / "with")
    config = model / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_shift": 0.75, "_diffusers_version": "0"}))
    said = rf"the scheduler's base_shift .* was {values['base_shift']}, now 0.75\. Put"
    with pytest.raises(InputError, match=said):
        train(make("with", timestep_shift="model", **common))
    assert store.steps() == [STOP]
    assert trained(train(make("without", **common)).lora.parent) == expected


# ---- checkpoints -------------------------------------------------------------------------------


def rewrite_state(store: CheckpointStore, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json and make its hash right again."""
    path = store.path(STOP) / "state.json"
    state = json.loads(path.read_bytes())
    del state["sha256"]
    change(state)
    path.write_bytes(canonical_json({**state, "sha256": hash_json(state)}))


@pytest.fixture
def stopped(make: Callable[..., Settings], tmp_path: Path) -> CheckpointStore:
    train(make("run"))
    return stop_at_three(tmp_path / "run")


def test_a_checkpoint_of_a_newer_format_is_refused(
    make: Callable[..., Settings], stopped: CheckpointStore
) -> None:
    rewrite_state(stopped, lambda state: state.update(format=2))
    with pytest.raises(InputError, match="has checkpoint format 2, this version reads 1"):
        train(make("run"))
    assert stopped.steps() == [STOP]


def test_a_setting_that_an_older_version_did_not_have_had_its_default(
    make: Callable[..., Settings], stopped: CheckpointStore
) -> None:
    rewrite_state(stopped, lambda state: state["facts"]["settings"].pop("use_rslora"))
    with pytest.raises(InputError, match="use_rslora was False, now True"):
        train(make("run", use_rslora=True))
    assert train(make("run")).resumed_from == STOP


def test_a_setting_that_only_a_newer_version_has_is_refused(
    make: Callable[..., Settings], stopped: CheckpointStore
) -> None:
    rewrite_state(stopped, lambda state: state["facts"]["settings"].update(magic=7))
    with pytest.raises(InputError, match="magic was 7, which this version does not know"):
        train(make("run"))


def forge(store: CheckpointStore, change: Callable[[Checkpoint], Checkpoint]) -> None:
    """A checkpoint with right hashes and other tensors."""
    store.save(change(store.load(STOP)), keep=1)


@pytest.mark.parametrize("what", ["lora", "optimizer_tensors"])
@pytest.mark.parametrize("how", ["shape", "missing"])
def test_tensors_of_another_lora_are_refused(
    make: Callable[..., Settings], stopped: CheckpointStore, what: str, how: str
) -> None:
    def change(old: Checkpoint) -> Checkpoint:
        tensors = dict(getattr(old, what))
        name = next(name for name in tensors if tensors[name].dim() == 2)
        if how == "missing":
            del tensors[name]
        else:
            tensors[name] = torch.zeros(3, 5)
        return replace(old, **{what: tensors})

    forge(stopped, change)
    before = (stopped.folder.parent / "metrics.jsonl").read_bytes()
    with pytest.raises(QwenLoraError) as refused:
        train(make("run"))
    assert re.search("saved LoRA|optimizer state", str(refused.value)), refused.value
    assert (stopped.folder.parent / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "entries",
    [
        {"base_lrs": ["fast"]},
        {"base_lrs": [0.1] * 5},
        {"last_epoch": "three"},
        {"last_epoch": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_forged_schedule_is_refused(
    make: Callable[..., Settings], stopped: CheckpointStore, entries: dict[str, Any]
) -> None:
    forge(stopped, lambda old: replace(old, scheduler={**old.scheduler, **entries}))
    with pytest.raises(QwenLoraError, match="the checkpoint's schedule state cannot be loaded"):
        train(make("run"))


def test_every_fact_of_a_run_is_compared(
    make: Callable[..., Settings], stopped: CheckpointStore
) -> None:
    """Each alone, so that none is forgotten when another is added."""
    from qwen_lora.train.resume import check_resume

    facts = stopped.load(STOP).facts
    settings = make("run", timestep_shift="model")
    run = stopped.folder.parent
    assert check_resume(run, facts, facts, settings, STOP) is None
    facts = replace(facts, scheduler={"shift": 1.0})
    others: dict[str, Any] = {
        "settings": {**facts.settings, "seed": 1},
        "compute_dtype": "bfloat16",
        "plan_id": "0" * 64,
        "fingerprints": ("0" * 64,),
        "base_model": "0" * 64,
        "scheduler": {"shift": 2.0},
    }
    # The shards are named by content, a plan's id covers how its steps are cut, and a resumed run
    # takes over what was chosen for its machine.
    chosen = {"attention", "compiled", "recompute", "blocks_on_device"}
    not_compared = {"generations", "micro_batches_per_step", *chosen}
    assert asdict(facts).keys() - others.keys() == not_compared
    for name, value in others.items():
        with pytest.raises(InputError, match="cannot continue"):
            check_resume(run, facts, replace(facts, **{name: value}), settings, STOP)
