"""Every setting of the schema, changed between a run and its resume: refused naming key, old and
new value where it would change the result, and without any effect on it where it would not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from qwen_lora.config.names import SECTION, fields, setting_facts, value_of
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.run import train
from tests.train.random_sets import random_map, random_prompts, random_set

STOP, LAST = 3, 6
FACTS = setting_facts()
RESULT = [k for k, f in FACTS.items() if f.command != "precompute" and f.changes == "result"]
NOTHING = [k for k, f in FACTS.items() if f.command != "precompute" and f.changes == "nothing"]
STAGE_ONE = [k for k, f in FACTS.items() if f.command == "precompute"]
# Values where "another of its type" would not do, or where the message is another.
OTHER: dict[str, Any] = {
    f"{SECTION}.group_weights": {"": 2.0},
    f"{SECTION}.img_dir": Path("elsewhere"),
    f"{SECTION}.alpha_background": "#000000",
    f"{SECTION}.bucket_step": 16,
    f"{SECTION}.img_size": [32, 512],
    "blocks_on_device": "1",
    "compile_blocks": True,
    "logging_dir": Path("other-logs"),
    "lora_alpha": 2.0,
    "lora_targets": ["to_q", "to_k"],
    "lr_step_rules": "1:2,0.1",
    "max_skip": 3,
    "mixed_precision": "bf16",
    "optimizer": "torch.optim.Adagrad",
    "optimizer_args": {"amsgrad": True},
    "preview_prompts": ["something else"],
    "preview_size": [32, 64],
    "preview_steps": 2,
    "recompute": "selective",
    "resume_from_checkpoint": f"step-{STOP:08d}",
    "shard_max_samples": 3,
    "state_dir": Path("state"),
    "timestep_shift": 2.0,
}
SAID = {
    "mixed_precision": r"the compute type \(mixed_precision\) was float32, now bfloat16",
    "shards": r"the weights of shards were \[1.0\], now \[3.0\]",
    "pretrained_model_name_or_path": r"the base model's content was \w{12}\.\.\., now \w{12}\.\.\.",
}
# What cannot be tried here, and where it is or why it need not be.
NOT_TRIED = {
    "max_train_steps": "a run may be made longer: test_train_run.py",
    "num_processes": "needs several processes: test_ranks.py",
    "transformer_file": "its content is the base model's: test_transformer_file.py",
    "report_to": "a tracker has to be installed: test_run_faults.py",
    f"{SECTION}.img_size": "the shards say what it was, and contradicting them is refused: below",
}


def another(key: str, now: Any) -> Any:
    """A valid value of a setting that is not its present one."""
    if key in OTHER:
        return OTHER[key]
    choices = [one for one in get_args(fields()[key].annotation) if isinstance(one, str)]
    if isinstance(now, bool):
        return not now
    if choices:
        return next(choice for choice in choices if choice != now)
    if isinstance(now, int):
        return now + 1
    if isinstance(now, float):
        return now / 2 if now else 0.25
    if isinstance(now, str):
        return "something else"
    raise AssertionError(f"say in OTHER to what {key} is to be changed")


class World:
    """A model, a set and a run that was stopped at step 3 of 6; and how it ends unbroken."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        pictures: dict[str, Any] = {"rgb": random_map(), "prompts": random_prompts(["a"])}
        self.shards = random_set(folder / "shards", 9, **pictures)
        self.base = {
            "pretrained_model_name_or_path": str(model),
            "shards_dir": self.shards,
            "rank": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": LAST,
            "checkpointing_steps": STOP,
            "validation_steps": 3,
            "preview_inference_steps": 2,
            "gradient_checkpointing": False,
        }
        self.unbroken = train(self.settings("unbroken")).lora.parent
        self.stopped = folder / "stopped"
        shutil.copytree(self.unbroken, self.stopped)
        shutil.rmtree(CheckpointStore(self.stopped).path(LAST))
        for name in ("lora.safetensors", "result.json"):
            (self.stopped / name).unlink()

    def settings(self, output: str, changes: dict[str, Any] | None = None) -> Settings:
        """`changes` by dotted key."""
        values: dict[str, Any] = {**self.base, "output_dir": self.folder / output}
        for key, value in (changes or {}).items():
            section, _, leaf = key.rpartition(".")
            (values.setdefault(section, {}) if section else values)[leaf] = value
        return Settings(**values)

    def value_of(self, key: str, changes: dict[str, Any] | None = None) -> Any:
        return value_of(self.settings("run", changes), key)

    def resume(self, changes: dict[str, Any]) -> Path:
        """Continue a copy of the stopped run with other settings."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        shutil.copytree(self.stopped, self.folder / "run")
        result = train(self.settings("run", changes))
        assert (result.resumed_from, result.steps) == (STOP, LAST)
        return result.lora.parent

    def refuse(self, changes: dict[str, Any]) -> str:
        """What a resume with other settings is refused with, before the first step."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        shutil.copytree(self.stopped, self.folder / "run")
        before = (self.folder / "run" / "metrics.jsonl").read_bytes()
        with pytest.raises(InputError) as refused:
            train(self.settings("run", changes))
        assert CheckpointStore(self.folder / "run").steps() == [STOP]
        assert (self.folder / "run" / "metrics.jsonl").read_bytes() == before
        return str(refused.value)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("changed"), tiny_model)


def same_bytes(one: Path, other: Path, *, lora: bool = True) -> None:
    files = [f"checkpoints/step-{LAST:08d}/{name}" for name in ("lora.safetensors", "state.json")]
    files += [files[0].replace("lora", "optimizer"), *(["lora.safetensors"] if lora else [])]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("key", [key for key in RESULT if key not in NOT_TRIED])
def test_what_changes_the_result_is_refused(world: World, key: str, tmp_path: Path) -> None:
    if key == "shards":
        changes: dict[str, Any] = {key: [{"path": world.shards, "weight": 3.0}]}
    elif key == "pretrained_model_name_or_path":
        changes = {key: str(changed_model(world.model, tmp_path / "model"))}
    else:
        changes = {key: another(key, world.value_of(key))}
    before, now = world.value_of(key), world.value_of(key, changes)
    assert before != now
    said = SAID.get(key, rf"(^|: ){re.escape(f'{key} was {before!r}, now {now!r}')}[;:.]")
    refused = world.refuse(changes)
    assert re.search(said, refused), refused
    assert refused.count(" was ") + refused.count(" were ") == 1, "only this has changed"


def changed_model(model: Path, copy: Path) -> Path:
    """The same model with one other number in its transformer's config."""
    shutil.copytree(model, copy)
    config = copy / "transformer" / "config.json"
    text = config.read_text()
    assert '"axes_dims_rope"' in text
    config.write_text(text.replace('"axes_dims_rope"', '"more": 1, "axes_dims_rope"'))
    return copy


@pytest.mark.parametrize("key", [key for key in NOTHING if key not in NOT_TRIED])
def test_what_changes_nothing_may_change(world: World, key: str, tmp_path: Path) -> None:
    if key == "output_dir":
        changes: dict[str, Any] = {}  # the run lies elsewhere than it was begun, as it does always
    elif key == "shards_dir":
        changes = {key: shutil.copytree(world.shards, tmp_path / "moved")}
    elif key == "shard_cache_dir":
        changes = {key: tmp_path / "cache"}
    else:
        changes = {key: another(key, world.value_of(key))}
        assert world.value_of(key, changes) != world.value_of(key)
    # A file of another type is another file; what was trained is the same.
    same_bytes(world.resume(changes), world.unbroken, lora=key != "save_dtype")


def test_what_only_the_first_stage_reads_may_change(world: World) -> None:
    """All of it together. What the shards know better is compared with them."""
    tried = [key for key in STAGE_ONE if key not in NOT_TRIED]
    changes = {key: another(key, world.value_of(key)) for key in tried}
    assert len(changes) > 30
    same_bytes(world.resume(changes), world.unbroken)
    refused = world.refuse({f"{SECTION}.img_size": [512]})
    assert re.search(rf"{SECTION}\.img_size is \[512\].* were made with \[32\]", refused)


def test_every_setting_is_tried_or_listed() -> None:
    assert sorted([*RESULT, *NOTHING, *STAGE_ONE]) == sorted(FACTS)
    assert OTHER.keys() <= FACTS.keys() and SAID.keys() <= set(RESULT)
    assert NOT_TRIED.keys() <= FACTS.keys()
    assert not NOT_TRIED.keys() & (OTHER.keys() - {f"{SECTION}.img_size"})


def test_a_model_that_lies_elsewhere_is_the_same(world: World, tmp_path: Path) -> None:
    moved = shutil.copytree(world.model, tmp_path / world.model.name)
    same_bytes(world.resume({"pretrained_model_name_or_path": str(moved)}), world.unbroken)
