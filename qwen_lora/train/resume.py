"""What a resumed run may change, and in what its ranks may differ. Imports no torch.

A setting that would change the result is refused, naming old and new. Exceptions: `max_train_steps`
for schedules that do not depend on it, and the way a step's micro-batches are shared between
accumulation and ranks, as long as their product stays. Moved folders are fine: the model, the plan
and the shard sets are compared by content.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from qwen_lora import __version__
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.train.checkpoint import RunFacts
from qwen_lora.train.lr_schedule import depends_on_max_steps

if TYPE_CHECKING:
    from qwen_lora.train.ranks import Ranks

# Compared by content or by a rule of their own, not by value.
_OWN_RULE = {
    "shards",
    "mixed_precision",
    "gradient_accumulation_steps",
    "max_train_steps",
}
# Places and sizes of one machine, in which ranks may differ.
_OF_MACHINE = {
    "pretrained_model_name_or_path",
    "transformer_file",
    "shards",
    "shards_dir",
    "output_dir",
    "logging_dir",
    "shard_cache_dir",
    "shard_cache_gib",
    "read_ahead",
    "num_processes",
}
_LIBRARIES = ("torch", "diffusers", "peft", "accelerate", "numpy")


def result_settings(settings: Settings) -> dict[str, Any]:
    """Every setting that changes the result of training, flat, as JSON values. Where things lie on
    this machine stays out, since checkpoints and LoRA files are shared: of `shards` the weights."""
    values = dict(_flat(settings, settings.model_dump(mode="json"), "", ("result",)))
    del values["pretrained_model_name_or_path"]
    return values | {"shards": [{"weight": source.weight} for source in settings.shards]}


def check_same_start(ranks: Ranks, settings: Settings) -> None:
    """Raise InputError on every rank when one has other settings or libraries: ranks that save or
    measure at other steps would wait for each other for ever."""
    values = dict(_flat(settings, settings.model_dump(mode="json"), "", ("result", "nothing")))
    mine = {name: value for name, value in values.items() if name not in _OF_MACHINE}
    mine |= {"the version of qwen-lora": __version__}
    mine |= {f"the version of {name}": version(name) for name in _LIBRARIES}
    everyone = ranks.gather_json(mine)
    for rank, theirs in enumerate(everyone):
        for name in sorted(theirs.keys() | everyone[0].keys()):
            here, there = everyone[0].get(name), theirs.get(name)
            if here != there:
                raise InputError(
                    f"{name} is {here!r} in process 0 and {there!r} in process {rank}; start all "
                    "processes with the same settings and the same packages"
                )


def _flat(
    section: BaseModel, values: dict[str, Any], prefix: str, changes: Collection[str]
) -> Iterator[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        facts = field.json_schema_extra
        if isinstance(value, BaseModel):
            yield from _flat(value, values[name], f"{prefix}{name}.", changes)
        elif (
            isinstance(facts, dict)
            and facts["command"] in ("train", "both")
            and facts["changes"] in changes
        ):
            yield f"{prefix}{name}", values[name]


def share_of_step(recorded: RunFacts | None, settings: Settings, world: int) -> tuple[int, int]:
    """(micro-batches of a step, accumulation on each rank). The first is fixed at the first start.

    Raises InputError when the ranks do not divide it, with the counts that do.
    """
    wanted = settings.gradient_accumulation_steps
    if recorded is None or wanted * world == recorded.micro_batches_per_step:
        return wanted * world, wanted
    total = recorded.micro_batches_per_step
    before = recorded.settings["gradient_accumulation_steps"]
    if wanted != before:
        raise InputError(
            f"gradient_accumulation_steps was {before}, now {wanted}: with {world} processes a "
            f"step would have {wanted * world} micro-batches instead of this run's {total}"
        )
    if total % world:
        counts = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise InputError(
            f"this run has {total} micro-batches a step, which {world} processes cannot share; "
            f"use one of these numbers of processes: {counts}"
        )
    return total, total // world


def check_resume(
    run: Path, old: RunFacts, new: RunFacts, settings: Settings, done_steps: int
) -> None:
    """Raises InputError naming every difference that would change the result."""
    problems = _setting_problems(old, new)
    problems += _weight_problem(old, new)
    problems += _length_problem(old, new, settings, done_steps)
    for name, what in (
        ("compute_dtype", "the compute type (mixed_precision)"),
        ("base_model", "the base model's content"),
        ("fingerprints", "the shard sets' fingerprints"),
    ):
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            problems.append(f"{what} was {_short(before)}, now {_short(now)}")
    problems += _scheduler_problems(old, new)
    if not problems and old.plan_id != new.plan_id:  # otherwise it only follows from the others
        held = "the shards hold other samples"
        if settings.shuffle == "block":
            held += ", or the same ones in other shards (shuffle: block follows them),"
        problems.append(f"{held} than {', '.join(old.generations)} of the first start")
    if problems:
        raise InputError(
            f"cannot continue {run}: " + "; ".join(problems) + ". Put the old values back, "
            "choose another --output, or start over with --restart"
        )


def _setting_problems(old: RunFacts, new: RunFacts) -> list[str]:
    """A setting that an older version did not have had its default there; one that only a newer
    version has cannot be kept."""
    defaults = result_settings(Settings())
    problems = []
    for name, now in new.settings.items():
        before = old.settings.get(name, defaults[name])
        if name not in _OWN_RULE and before != now:
            problems.append(f"{name} was {before!r}, now {now!r}")
    for name in sorted(old.settings.keys() - new.settings.keys()):
        problems.append(f"{name} was {old.settings[name]!r}, which this version does not know")
    return problems


def _scheduler_problems(old: RunFacts, new: RunFacts) -> list[str]:
    if old.scheduler is None or new.scheduler is None:  # other settings, which are named already
        return []
    return [
        f"the scheduler's {key} (timestep_shift: model) was {old.scheduler.get(key)!r}, now "
        f"{new.scheduler.get(key)!r}"
        for key in sorted(old.scheduler.keys() | new.scheduler.keys())
        if old.scheduler.get(key) != new.scheduler.get(key)
    ]


def _weight_problem(old: RunFacts, new: RunFacts) -> list[str]:
    """Shard sets may have moved; their weights may not change."""
    before, now = (
        [source["weight"] for source in facts.settings["shards"]] or [1.0] for facts in (old, new)
    )
    return [f"the weights of shards were {before}, now {now}"] if before != now else []


def _length_problem(old: RunFacts, new: RunFacts, settings: Settings, done_steps: int) -> list[str]:
    before, now = old.settings["max_train_steps"], new.settings["max_train_steps"]
    if now < done_steps:
        return [f"max_train_steps is {now}, and {done_steps} steps are done"]
    if before == now or not depends_on_max_steps(settings):
        return []
    return [
        f"max_train_steps was {before}, now {now}, and the {settings.lr_scheduler} schedule "
        "depends on it"
    ]


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    text = str(value)
    return text[:12] + "..." if len(text) > 40 else text
