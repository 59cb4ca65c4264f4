"""Where this machine keeps what can be fetched or made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`name` inside QWEN_LORA_CACHE, else inside `~/.cache/qwen-lora`."""
    base = os.environ.get("QWEN_LORA_CACHE") or "~/.cache/qwen-lora"
    return Path(base).expanduser() / name
