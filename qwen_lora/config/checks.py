"""Checks across settings: what contradicts, and what was given without having an effect.

Only keys that somebody gave count, and only those that the running command reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen_lora.config.field import Command
from qwen_lora.config.schema import Settings


@dataclass(frozen=True)
class NoEffect:
    """`key` does something only when `when` holds; `needs` says so in words."""

    command: Command
    key: str
    when: Callable[[Settings], bool]
    needs: str


def _sampling(name: str) -> Callable[[Settings], bool]:
    return lambda s: s.timestep_sampling == name


def _schedule(name: str) -> Callable[[Settings], bool]:
    return lambda s: s.lr_scheduler == name


def _not_square(settings: Settings) -> bool:
    return not settings.data_config.square


NO_EFFECT = (
    NoEffect("train", "logit_mean", _sampling("logit_normal"), "timestep_sampling is logit_normal"),
    NoEffect("train", "logit_std", _sampling("logit_normal"), "timestep_sampling is logit_normal"),
    NoEffect("train", "mode_scale", _sampling("mode"), "timestep_sampling is mode"),
    NoEffect(
        "train",
        "lr_num_cycles",
        _schedule("cosine_with_restarts"),
        "lr_scheduler is cosine_with_restarts",
    ),
    NoEffect("train", "lr_power", _schedule("polynomial"), "lr_scheduler is polynomial"),
    NoEffect(
        "train",
        "lr_step_rules",
        _schedule("piecewise_constant"),
        "lr_scheduler is piecewise_constant",
    ),
    NoEffect(
        "train", "validation_max_images", lambda s: s.validation_steps > 0, "validation_steps > 0"
    ),
    NoEffect("precompute", "data_config.min_aspect", _not_square, "data_config.square is false"),
    NoEffect("precompute", "data_config.max_aspect", _not_square, "data_config.square is false"),
)


def check(
    command: Command, settings: Settings, explicit: frozenset[str]
) -> tuple[list[str], list[str]]:
    """Problems and notes, one line each, of settings that are valid one by one."""
    problems = [
        f"{rule.key}: has no effect here; it needs {rule.needs}"
        for rule in NO_EFFECT
        if rule.command == command and rule.key in explicit and not rule.when(settings)
    ]
    notes: list[str] = []
    if command == "train":
        _check_train(settings, explicit, problems, notes)
    else:
        _check_precompute(settings, problems)
    return problems, notes


def _check_train(
    settings: Settings, explicit: frozenset[str], problems: list[str], notes: list[str]
) -> None:
    scheduler = settings.lr_scheduler
    if settings.lr_warmup_steps > 0 and scheduler in ("constant", "piecewise_constant"):
        # Not an error: the field's published files say so, and diffusers ignores it as well.
        notes.append(
            f"lr_warmup_steps has no effect with lr_scheduler {scheduler}; "
            "constant_with_warmup warms up"
        )
    if scheduler == "piecewise_constant" and settings.lr_step_rules is None:
        problems.append(
            "lr_step_rules: piecewise_constant needs rules such as 1:1000,0.1:2000,0.01"
        )
    if settings.lr_warmup_steps > settings.max_train_steps:
        problems.append(
            f"lr_warmup_steps: {settings.lr_warmup_steps} is more than "
            f"max_train_steps {settings.max_train_steps}"
        )
    paths = [str(source.path) for source in settings.shards]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        problems.append(f"shards: {path} is given twice; give it once with a weight")


def _check_precompute(settings: Settings, problems: list[str]) -> None:
    data = settings.data_config
    if data.square and data.random_ratio:
        problems.append("data_config.random_ratio: contradicts data_config.square; choose one")
    if len(set(data.img_size)) != len(data.img_size):
        problems.append("data_config.img_size: the same resolution twice")
    if settings.encoder_placement == "offload" and settings.text_encoder_quantization != "none":
        problems.append(
            "text_encoder_quantization: a quantised text encoder cannot be streamed from host "
            "memory; use encoder_placement auto or text_encoder_quantization none"
        )
