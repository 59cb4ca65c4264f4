"""Shard sets behind a URL: protocols (`base`), and how one of them becomes a store (`store`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_lora.shards.remote.base import Remote

_PROTOCOLS = {  # all of them are for reading
    "http": ("http", "open_http_remote"),
    "https": ("http", "open_http_remote"),
    "hf": ("hub", "open_hub_remote"),
}
_OTHERS = ("objects", "open_object_remote")  # what fsspec knows


def is_read_only(url: str) -> bool:
    """Whether sets at such a URL can only be read: told by its protocol, without asking anybody."""
    return _scheme(url) in _PROTOCOLS


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def open_remote(url: str) -> Remote:
    """The protocol for a set's URL; nothing is asked of the server yet.

    Raises InputError for a protocol that this installation lacks, saying what to install.
    """
    module, function = _PROTOCOLS.get(_scheme(url), _OTHERS)
    remote: Remote = getattr(import_module(f"{__name__}.{module}"), function)(url)
    return remote
