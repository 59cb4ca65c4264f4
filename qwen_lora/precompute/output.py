"""Where stage 1 writes: into a folder, or to a URL with a folder of this machine's beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.shards.store import LOCAL, FolderStore, Store


def local_state(settings: Settings) -> Path:
    """What this machine keeps of a set: lock, report, remembered hashes, temporaries.

    `.local` in the set's folder; for a URL `state_dir`, or a folder in this machine's cache.
    Raises InputError for a `state_dir` beside a folder, which has its own.
    """
    place, state = settings.shards_dir, settings.state_dir
    if isinstance(place, Path):
        if state is not None:
            raise InputError(
                f"state_dir {state} is for a set at a URL; the folder {place} keeps the same in "
                f"{place / LOCAL}: leave --state-dir out"
            )
        return place / LOCAL
    if state is not None:
        return state
    from qwen_lora.redact import without_secrets
    from qwen_lora.shards.remote.store import default_state

    return default_state(without_secrets(place).rstrip("/"))


def folder_option(settings: Settings) -> str:
    """The option that names `local_folder`."""
    return "--output" if isinstance(settings.shards_dir, Path) else "--state-dir"


def local_folder(settings: Settings) -> Path:
    """The folder of this machine that gets files: the set's own, or the one for its state."""
    place = settings.shards_dir
    return place if isinstance(place, Path) else local_state(settings)


@contextmanager
def open_output(settings: Settings) -> Iterator[Store]:
    """The store that gets the shards.

    Raises InputError for a URL that this installation lacks the package for, or that can only be
    read.
    """
    place, state = settings.shards_dir, local_state(settings)
    if isinstance(place, Path):
        yield FolderStore(place)
        return
    from qwen_lora.shards.remote import is_read_only
    from qwen_lora.shards.remote.cache import ShardCache
    from qwen_lora.shards.remote.store import open_remote_store

    if is_read_only(place):
        raise InputError(f"{place} can only be read; write to a folder or an s3:// URL")
    cache = ShardCache.default(settings.shard_cache_dir, settings.shard_cache_gib)
    store = open_remote_store(place, cache, state)
    try:
        store.check_writable()
        yield store
    finally:
        store.close()
