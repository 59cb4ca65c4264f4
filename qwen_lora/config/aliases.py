"""Keys of other trainers' files that are read here: mapped to a setting, or named as not needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WEIGHTING = "weighting_scheme"
_SAMPLING = ("logit_normal", "mode")
_LOSS = ("sigma_sqrt", "cosmap")
_TRUE = frozenset(["true", "yes", "on", "1", "y", "t"])
_FALSE = frozenset(["false", "no", "off", "0", "n", "f"])

# The key is read and has nothing to do; the sentence says why.
NOT_NEEDED = {
    "precompute_text_embeddings": "precompute always caches the embeddings",
    "precompute_image_embeddings": "precompute always caches the latents",
    "save_cache_on_disk": "the cache is the shard set, always on disk",
    "wandb_run_name": "set WANDB_NAME in the environment",
    "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_tags": "set WANDB_TAGS in the environment",
}
RENAMED = {
    "data_config.train_batch_size": "train_batch_size",
    "data_config.num_workers": "decode_workers",
    "wandb_project_name": "tracker_project_name",
}
SWITCHES = {"quantize": ("base_precision", "int8"), "adam8bit": ("optimizer", "adamw8bit")}
KNOWN = frozenset([*NOT_NEEDED, *RENAMED, *SWITCHES, WEIGHTING])


@dataclass
class Translation:
    """The settings that a layer's foreign keys stand for."""

    values: dict[str, Any] = field(default_factory=dict)  # setting -> value
    origin: dict[str, str] = field(default_factory=dict)  # setting -> the foreign key
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def translate(flat: dict[str, Any]) -> Translation:
    """Read the foreign keys of one layer (a file, the --set options).

    A key that says something else than the setting it stands for is a problem, except the project
    name of a tracker, which two trackers may have, and `weighting_scheme: none`.
    """
    result = Translation()
    for key, value in flat.items():
        if key not in KNOWN or value is None:
            continue
        if key in NOT_NEEDED:
            result.notes.append(f"{key} is not needed: {NOT_NEEDED[key]}")
            continue
        for name, new in _meaning(key, value, result.problems).items():
            given = flat.get(name, result.values.get(name))
            if given is None:
                result.values[name], result.origin[name] = new, key
                result.notes.append(f"{key}: {value} is read as {name}: {new}")
            elif str(given) != str(new) and str(value).lower() != "none":
                if name == "tracker_project_name":
                    result.notes.append(f"{key} is not needed: {name} is given")
                else:
                    result.problems.append(
                        f"{key}: {value} means {name}: {new}, but {name} is {given}"
                    )
    return result


def _meaning(key: str, value: Any, problems: list[str]) -> dict[str, Any]:
    """The settings that a foreign key stands for; empty when it changes nothing."""
    text = str(value).lower()
    if key == WEIGHTING:
        if text in _SAMPLING:
            return {"timestep_sampling": text}
        if text in _LOSS:
            return {"loss_weighting": text}
        if text == "none":
            return {"timestep_sampling": "none", "loss_weighting": "none"}
        choices = ", ".join(["none", *_SAMPLING, *_LOSS])
        problems.append(f"{key}: must be one of {choices}, not {value!r}")
        return {}
    if key in SWITCHES:
        if text not in _TRUE | _FALSE:
            problems.append(f"{key}: must be true or false, not {value!r}")
        name, new = SWITCHES[key]
        return {name: new} if text in _TRUE else {}
    if key == "data_config.num_workers" and text == "0":
        value = "1"  # 0 is a DataLoader's word for "in this process"
    return {RENAMED[key]: value}
