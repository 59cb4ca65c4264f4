# ruff: noqa: TID253
"""Which base model a run trains on, by content, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.hashing import hash_json
from qwen_lora.models import ModelFolder
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.run_folder import WEIGHT_HASHES
from qwen_lora.weight_hashes import weight_hashes


def base_of_all(ranks: Ranks, settings: Settings, model: ModelFolder) -> str:
    """The base model's fingerprint. Each machine reads its own copy: raises InputError on every
    rank when one has another model."""
    # A run that goes on elsewhere has its folder, not this machine's cache.
    first: str = ranks.on_main(lambda: base_fingerprint(model, settings.output_dir / WEIGHT_HASHES))

    def compare() -> None:
        if ranks.leads_other_node and (here := base_fingerprint(model)) != first:
            raise InputError(
                f"the base model of process {ranks.rank} ({here[:12]}...) is another than that of "
                f"process 0 ({first[:12]}...); name the same one, with its @revision, on all "
                "machines"
            )

    ranks.everywhere(compare)
    return first


def base_fingerprint(model: ModelFolder, hashes: Path | None = None) -> str:
    """Names the transformer by content: config keys that are not about files, and weight hashes
    (`hashes`: where they are remembered too)."""
    weights = weight_hashes(model.weights("transformer"), hashes)
    return hash_json([content(model, "transformer"), sorted(weights.values())])


def content(model: ModelFolder, component: str) -> dict[str, Any]:
    """A component's config without what is about files and versions."""
    return {k: v for k, v in model.config(component).items() if not k.startswith("_")}
