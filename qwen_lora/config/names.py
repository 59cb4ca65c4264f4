"""The names of settings: the flat list of dotted keys, and which one somebody may have meant."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from qwen_lora.config.field import SettingFacts, facts
from qwen_lora.config.schema import DataConfig, Settings

SECTION = "data_config"
# Settings that hold a dictionary: what follows the key's dot is the dictionary's own key.
DICTS = frozenset(["optimizer_args", f"{SECTION}.group_weights"])

# What other trainers call these things.
ELSEWHERE = {
    "alpha": "lora_alpha",
    "network_alpha": "lora_alpha",
    "network_dim": "rank",
    "lora_rank": "rank",
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "batch_size": "train_batch_size",
    "steps": "max_train_steps",
    "max_steps": "max_train_steps",
    "num_train_steps": "max_train_steps",
    "resolution": f"{SECTION}.img_size",
    "image_size": f"{SECTION}.img_size",
    "image_dir": f"{SECTION}.img_dir",
    "train_data_dir": f"{SECTION}.img_dir",
    "instance_data_dir": f"{SECTION}.img_dir",
    "instance_prompt": f"{SECTION}.trigger_word",
    "model": "pretrained_model_name_or_path",
    "model_path": "pretrained_model_name_or_path",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
    "save_every": "checkpointing_steps",
    "target_modules": "lora_targets",
    "lora_layers": "lora_targets",
    "dropout": "lora_dropout",
    "flow_shift": "timestep_shift",
    "shift": "timestep_shift",
}


@cache
def fields() -> dict[str, FieldInfo]:
    """Every setting by its dotted key, in the order of the schema; sections themselves left out."""
    found: dict[str, FieldInfo] = {}
    for name, info in Settings.model_fields.items():
        if name == SECTION:
            found.update({f"{SECTION}.{k}": i for k, i in DataConfig.model_fields.items()})
        else:
            found[name] = info
    return found


@cache
def setting_facts() -> dict[str, SettingFacts]:
    """What each setting declares about itself, by dotted key."""
    return {key: facts(info) for key, info in fields().items()}


def value_of(settings: Settings, key: str) -> Any:
    """A setting's value by its dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def nearest(key: str) -> str:
    """The known key that is most like an unknown one."""
    leaf = key.rsplit(".", 1)[-1].replace("-", "_").lower()
    if leaf in ELSEWHERE:
        return ELSEWHERE[leaf]

    def likeness(known: str) -> float:
        compared = known if "." in key else known.rsplit(".", 1)[-1]
        wanted = key.lower() if "." in key else leaf
        return max(
            difflib.SequenceMatcher(None, wanted, compared).ratio(),
            difflib.SequenceMatcher(None, leaf, known.rsplit(".", 1)[-1]).ratio(),
        )

    return max(fields(), key=likeness)
