"""A shard set behind a URL as a store."""

from __future__ import annotations

from qwen_lora.errors import InputError
from qwen_lora.shards.store import Store


def open_remote_store(url: str) -> Store:
    """Raises InputError: no protocol is there yet."""
    raise InputError(f"{url}: remote sets are not supported by this version; copy the set here")
