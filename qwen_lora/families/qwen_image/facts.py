"""What of Qwen-Image's configs and files shapes the tensors in the shards. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image import constants
from qwen_lora.hashing import sha256_file
from qwen_lora.models import ModelFolder


def vae_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Raises InputError if the config lacks a key or the VAE has another latent shape."""
    facts = _pick(config, constants.VAE_CONFIG_KEYS, "vae")
    channels, scale = facts["z_dim"], 2 ** (len(facts["dim_mult"]) - 1)
    if (channels, scale) != (constants.LATENT_CHANNELS, constants.LATENT_SCALE):
        raise InputError(
            f"the model's VAE makes {channels} channels at 1/{scale} size; Qwen-Image's makes "
            f"{constants.LATENT_CHANNELS} at 1/{constants.LATENT_SCALE}"
        )
    return {"config": facts}


def text_facts(model: ModelFolder) -> dict[str, Any]:
    config = model.config("text_encoder")
    return {
        "config": _text_config(config),
        "tokenizer": _tokenizer_hashes(model.component("tokenizer")),
        "template": constants.TEMPLATE_HEAD
        + constants.TEMPLATE_TEXT
        + "{}"
        + constants.TEMPLATE_TAIL,
        "dropped_tokens": constants.DROPPED_TOKENS,
        "max_tokens": constants.MAX_TOKENS,
    }


def text_width(config: Mapping[str, Any]) -> int:
    return int(_text_config(config)["hidden_size"])


def transformer_facts(config: Mapping[str, Any]) -> dict[str, int]:
    facts = _pick(config, ("in_channels", "joint_attention_dim"), "transformer")
    return {
        "latent_channels": int(facts["in_channels"]) // constants.PATCH**2,
        "text_width": int(facts["joint_attention_dim"]),
    }


def block_count(config: Mapping[str, Any]) -> int:
    return int(_pick(config, ("num_layers",), "transformer")["num_layers"])


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The named keys, whether the config is nested under `text_config` or flat, as published, and
    whether rope's numbers stand under `rope_parameters` or `rope_scaling` and `rope_theta`."""
    text = config.get("text_config") or config
    facts = _pick(text, constants.TEXT_CONFIG_KEYS, "text_encoder")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    facts["rms_norm_eps"] = float(facts["rms_norm_eps"])
    facts["rope_theta"] = float(rope.get("rope_theta") or text.get("rope_theta") or 1e6)
    facts["mrope_section"] = rope.get("mrope_section")
    return facts


def _pick(config: Mapping[str, Any], keys: tuple[str, ...], component: str) -> dict[str, Any]:
    for key in keys:
        if key not in config:
            raise InputError(f"the model's {component}/config.json has no {key!r}")
    return {key: config[key] for key in keys}


def _tokenizer_hashes(folder: Path) -> dict[str, str]:
    try:
        return {
            name: sha256_file(folder / name)
            for name in constants.TOKENIZER_FILES
            if (folder / name).is_file()
        }
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
