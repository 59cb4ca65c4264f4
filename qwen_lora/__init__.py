"""qwen-lora: cache a captioned image folder once, then train LoRA adapters from the cache.

    settings = qwen_lora.load_settings("train", Path("lora.yaml"))
    result = qwen_lora.train(settings)

The names of `__all__` are the public API; importing the package loads none of them, and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from qwen_lora.config.load import load_settings
    from qwen_lora.config.schema import DataConfig, Settings
    from qwen_lora.errors import InputError, QwenLoraError, ShardError
    from qwen_lora.precompute.run import precompute
    from qwen_lora.sample import sample
    from qwen_lora.shards.reader import ShardSet
    from qwen_lora.shards.verify import verify
    from qwen_lora.tiny_model import write_tiny_model
    from qwen_lora.train.objective import flow_matching_loss
    from qwen_lora.train.run import train

__version__ = "0.1.0"

# name -> module that has it; loaded when it is first used
_WHERE = {
    "DataConfig": "qwen_lora.config.schema",
    "InputError": "qwen_lora.errors",
    "QwenLoraError": "qwen_lora.errors",
    "Settings": "qwen_lora.config.schema",
    "ShardError": "qwen_lora.errors",
    "ShardSet": "qwen_lora.shards.reader",
    "flow_matching_loss": "qwen_lora.train.objective",
    "load_settings": "qwen_lora.config.load",
    "precompute": "qwen_lora.precompute.run",
    "sample": "qwen_lora.sample",
    "train": "qwen_lora.train.run",
    "verify": "qwen_lora.shards.verify",
    "write_tiny_model": "qwen_lora.tiny_model",
}

__all__ = [
    "DataConfig",
    "InputError",
    "QwenLoraError",
    "Settings",
    "ShardError",
    "ShardSet",
    "__version__",
    "flow_matching_loss",
    "load_settings",
    "open_shards",
    "precompute",
    "sample",
    "train",
    "verify",
    "write_tiny_model",
]


def open_shards(place: str | Path, generation: str | None = None) -> ShardSet:
    """Open a shard set, a folder or a URL, for reading, without torch: its newest generation, or
    the manifest file named. Raises InputError when there is none, ShardError when it is damaged."""
    from qwen_lora.shards.reader import ShardSet

    return ShardSet.open(place, generation)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qwen_lora' has no attribute {name!r}")
    if name in ("precompute", "sample", "train"):  # modules of the same name, which can be called
        return import_module(f"qwen_lora.{name}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
