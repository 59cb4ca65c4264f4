"""Checks across settings: what contradicts, and what was given without having an effect.

Only keys that somebody gave count, and only those that the running command reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qwen_lora.config.field import Command
from qwen_lora.config.names import SECTION, value_of
from qwen_lora.config.schema import Settings


@dataclass(frozen=True)
class NoEffect:
    """`key` does something only when the setting `other` fulfils `holds`; `needs` says so."""

    command: Command
    key: str
    other: str
    holds: Callable[[Any], bool]
    needs: str


def _is(command: Command, key: str, other: str, value: str) -> NoEffect:
    return NoEffect(command, key, other, lambda given: given == value, f"{other}: {value}")


NO_EFFECT = (
    _is("train", "logit_mean", "timestep_sampling", "logit_normal"),
    _is("train", "logit_std", "timestep_sampling", "logit_normal"),
    _is("train", "mode_scale", "timestep_sampling", "mode"),
    _is("train", "lr_num_cycles", "lr_scheduler", "cosine_with_restarts"),
    _is("train", "lr_power", "lr_scheduler", "polynomial"),
    _is("train", "lr_step_rules", "lr_scheduler", "piecewise_constant"),
    NoEffect(
        "train",
        "low_precision_products",
        "base_precision",
        lambda precision: precision in ("fp8", "int8"),
        "base_precision: fp8 or int8",
    ),
    NoEffect(
        "train",
        "offload_activations",
        "gradient_checkpointing",
        lambda on: bool(on),
        "gradient_checkpointing: true",
    ),
    NoEffect(
        "train",
        "validation_max_images",
        "validation_steps",
        lambda steps: bool(steps),
        "validation_steps above 0",
    ),
    *(
        NoEffect(
            "train",
            key,
            "preview_steps",
            lambda steps: steps is None or steps > 0,
            "preview_steps empty or above 0",
        )
        for key in (
            "preview_inference_steps",
            "preview_guidance",
            "preview_seed",
            "preview_size",
            "preview_vae",
        )
    ),
    *(
        NoEffect(
            "precompute",
            f"{SECTION}.{key}",
            f"{SECTION}.square",
            lambda square: not square,
            f"{SECTION}.square: false",
        )
        for key in ("min_aspect", "max_aspect")
    ),
)


@dataclass(frozen=True)
class Finding:
    """One line about `keys`; the first is what the person should change."""

    keys: tuple[str, ...]
    text: str
    is_note: bool = False

    @property
    def line(self) -> str:
        return f"{self.keys[0]}: {self.text}"


def check(command: Command, settings: Settings, explicit: frozenset[str]) -> list[Finding]:
    """Findings across settings that are valid one by one."""
    findings = [
        Finding((rule.key, rule.other), f"has no effect here; it needs {rule.needs}")
        for rule in NO_EFFECT
        if rule.command == command
        and rule.key in explicit
        and not rule.holds(value_of(settings, rule.other))
    ]
    more = _check_train(settings) if command == "train" else _check_precompute(settings)
    return [*findings, *more]


def _check_train(settings: Settings) -> Iterator[Finding]:
    scheduler, warmup = settings.lr_scheduler, settings.lr_warmup_steps
    if warmup > 0 and scheduler in ("constant", "piecewise_constant"):
        # Not an error: published files say so, and diffusers ignores it without a word.
        yield Finding(
            ("lr_warmup_steps", "lr_scheduler"),
            f"has no effect with lr_scheduler: {scheduler}; constant_with_warmup warms up",
            is_note=True,
        )
    elif warmup > settings.max_train_steps:
        yield Finding(
            ("lr_warmup_steps", "max_train_steps"),
            f"{warmup} is more than max_train_steps {settings.max_train_steps}",
        )
    if scheduler == "piecewise_constant" and settings.lr_step_rules is None:
        yield Finding(
            ("lr_step_rules", "lr_scheduler"),
            "piecewise_constant needs rules such as 1:1000,0.1:2000,0.01",
        )
    if settings.shard_base != "none" and settings.base_precision == "nf4":
        yield Finding(
            ("shard_base", "base_precision"),
            "cannot spread weights held as nf4, which are not packed by rows; use base_precision: "
            "fp8, int8 or bf16, or shard_base: none",
        )
    if settings.shard_base != "none" and settings.blocks_on_device.isdecimal():
        yield Finding(
            ("blocks_on_device", "shard_base"),
            "is not for a base that is spread over processes; use all, or shard_base: none",
        )
    if settings.shard_base != "none" and settings.oom_fallback:
        yield Finding(
            ("oom_fallback", "shard_base"),
            "is not for a base that is spread over processes, which have to do the same",
        )
    if not settings.own_forward:
        for key, given in (
            ("blocks_on_device", settings.blocks_on_device.isdecimal()),
            ("offload_activations", settings.offload_activations),
            ("oom_fallback", settings.oom_fallback),
        ):
            if given:
                yield Finding((key, "own_forward"), "needs this trainer's own_forward: true")
    if settings.optimizer == "prodigy" and settings.learning_rate < 0.1:
        yield Finding(
            ("learning_rate", "optimizer"),
            f"is {settings.learning_rate}; Prodigy finds its own step size and expects about 1",
            is_note=True,
        )
    paths = [str(source.path) for source in settings.shards]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield Finding(("shards",), f"{path} is given twice; give it once with a weight")


def _check_precompute(settings: Settings) -> Iterator[Finding]:
    data = settings.data_config
    if data.square and data.random_ratio:
        yield Finding(
            (f"{SECTION}.random_ratio", f"{SECTION}.square"),
            f"contradicts {SECTION}.square; choose one",
        )
    if len(set(data.img_size)) != len(data.img_size):
        yield Finding((f"{SECTION}.img_size",), "names a resolution twice")
    if settings.encoder_placement == "offload" and settings.text_encoder_quantization != "none":
        yield Finding(
            ("text_encoder_quantization", "encoder_placement"),
            "a quantised text encoder cannot be streamed from host memory; "
            "use encoder_placement: auto or text_encoder_quantization: none",
        )
