"""Train's check that the settings file and the shard set tell the same story."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qwen_lora.config.names import SECTION
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.shards.format import Manifest


def check_against_manifest(
    settings: Settings, explicit_keys: Collection[str], manifest: Manifest, name: str = "the shards"
) -> None:
    """Refuse data_config values that somebody gave and that the shard set was not made with.

    The recipe in the manifest holds the resolutions, bucket, crop and flip rules under the names of
    data_config; defaults and other keys are not compared. Raises InputError naming both values.
    """
    differences = []
    for key, made_with in manifest.recipe.items():
        dotted = f"{SECTION}.{key}"
        if dotted not in explicit_keys:
            continue
        asked = getattr(settings.data_config, key)
        if _comparable(asked) != _comparable(made_with):
            differences.append(
                f"{dotted} is {_text(asked)}, {name} were made with {_text(made_with)}"
            )
    if differences:
        raise InputError(
            f"{'; '.join(differences)}. Correct or delete it, or precompute another shard set"
        )


def _comparable(value: Any) -> Any:
    return sorted(set(value)) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
