"""The generations of a set: which there are, and which files each of them needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen_lora.errors import InputError, ShardError
from qwen_lora.shards.format import FileEntry, Manifest
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.remote.base import RemoteError
from qwen_lora.shards.store import Store


@dataclass(frozen=True)
class Generation:
    name: str  # manifest-<hash>.json
    manifest: Manifest


def walk_generations(store: Store) -> Iterator[Generation]:
    """The newest generation and those before it, as far as they are kept and intact.

    Raises InputError or ShardError, as `load_manifest` does, when the newest cannot be read, and
    RemoteError for an older one about which a store gives no answer.
    """
    manifest, name = load_manifest(store)
    while True:
        yield Generation(name, manifest)
        if manifest.previous is None:
            return
        name = manifest.previous
        try:
            manifest = load_manifest(store, name)[0]
        except (InputError, ShardError):  # pruned or damaged: nothing older can be told from it
            return
        except RemoteError:
            if store.names() is None:  # without the right to list, this is how "gone" is said
                return
            raise


def listed_files(manifest: Manifest) -> dict[str, FileEntry]:
    """Every file that a generation needs besides its own manifest, by name."""
    entries = [entry.tar for entry in manifest.shards]
    entries += [entry.sidecar for entry in manifest.shards]
    entries.append(manifest.unconditional)
    optional = (manifest.previews, manifest.rgb, manifest.retired)
    entries += [entry for entry in optional if entry is not None]
    return {entry.name: entry for entry in entries}
