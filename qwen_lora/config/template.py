"""Settings as text: the commented file of `qwen-lora init`, and what a run prints at its start."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qwen_lora.config.field import Command, facts
from qwen_lora.config.names import SECTION, fields, setting_facts, value_of
from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.redact import redact

WIDTH = 100
_PLAIN = re.compile(r"[\w./+](?:[\w ./+=()-]*[\w./+=()-])?")
# What nearly everyone sets; the other keys stand as comments.
_LIVE = frozenset(
    [
        "pretrained_model_name_or_path",
        f"{SECTION}.img_dir",
        f"{SECTION}.img_size",
        f"{SECTION}.caption_dropout_rate",
        f"{SECTION}.caption_type",
        "shards_dir",
        "output_dir",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "learning_rate",
        "lr_scheduler",
        "mixed_precision",
        "rank",
        "checkpointing_steps",
        "checkpoints_total_limit",
    ]
)
_TITLES: dict[str, str] = {
    "both": "both commands",
    "precompute": "precompute: images and captions to shards",
    "train": "train: shards to a LoRA",
}
_HEAD = """\
# Settings of qwen-lora: every key with its default, for both commands.
#
#   qwen-lora precompute --config {name}
#   qwen-lora train --config {name}
#
# An empty value means the default. `--set key=value` and the options win over this file.
# A key without effect in the running command is an error, so most stand as comments here.
"""


def template(name: str = "lora.yaml") -> str:
    """The commented settings file; loading it gives the defaults."""
    parts = [_HEAD.format(name=name)]
    for command in ("both", "precompute", "train"):
        own = [k for k, f in setting_facts().items() if f.command == command and "." not in k]
        parts += [_title(_TITLES[command]), *(_entry(key) for key in own)]
        if command == "both":
            parts.append(_data_config())
    return "\n".join(parts)


def _data_config() -> str:
    parts = ["# Images and captions.", f"{SECTION}:"]
    for key in (f"{SECTION}.{name}" for name in DataConfig.model_fields):
        parts.append(textwrap.indent(_entry(key), "  "))
    return "\n".join(parts)


def _title(text: str) -> str:
    return f"# ---- {text} " + "-" * (WIDTH - 8 - len(text)) + "\n"


def _entry(key: str) -> str:
    info = fields()[key]
    indent = 2 if key.startswith(SECTION) else 0
    sentence = info.description or ""
    known = choices(info)
    if known and not all(choice in sentence for choice in known):
        sentence += f" One of: {', '.join(known)}."
    who = facts(info).command
    if key.startswith(SECTION):
        sentence += {"both": " (both)", "train": " (train)"}.get(who, "")
    lines = textwrap.wrap(sentence, WIDTH - 2 - indent)
    value = yaml_text(info.get_default(call_default_factory=True))
    mark = "" if key in _LIVE else "# "
    bare = key.rsplit(".", 1)[-1]
    return "\n".join([*(f"# {line}" for line in lines), f"{mark}{bare}: {value}".rstrip(), ""])


def choices(info: FieldInfo) -> list[str]:
    """The words a setting may be, when it is one of a few."""
    if getattr(info.annotation, "__origin__", None) is Literal:
        return [str(choice) for choice in get_args(info.annotation)]
    return []


def yaml_text(value: Any) -> str:
    """A setting's value as one would write it in YAML."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml_text(part) for part in value) + "]"
    if isinstance(value, BaseModel):
        return yaml_text(value.model_dump())
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {yaml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e-0", "e-")
    text = value.as_posix() if isinstance(value, Path) else str(value)
    if _PLAIN.fullmatch(text) and text.lower() != "null":
        return text
    return json.dumps(text, ensure_ascii=False)  # a JSON text is a YAML text


def describe(command: Command, settings: Settings) -> str:
    """The resolved settings of a command: those that differ from the default one a line, then the
    defaults as one paragraph."""
    changed, rest = [], []
    for key, fact in setting_facts().items():
        if fact.command not in (command, "both"):
            continue
        value = value_of(settings, key)
        is_default = value == fields()[key].get_default(call_default_factory=True)
        if is_default:
            rest.append(f"{key}={yaml_text(value) or '(empty)'}")
        else:
            changed.append(f"  {key}: {yaml_text(value)}")
    defaults = textwrap.fill(
        " ".join(rest), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    return redact("\n".join([f"settings of {command}", *changed, "defaults", defaults]))
