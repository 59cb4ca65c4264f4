"""One stage 1 run on several machines: all must mean the same and write to the same place."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_lora import __version__
from qwen_lora.config.field import facts
from qwen_lora.config.names import fields
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.models import ModelFolder
from qwen_lora.precompute.output import folder_option
from qwen_lora.precompute.world import World
from qwen_lora.shards.format import Fingerprint
from qwen_lora.shards.store import Store
from qwen_lora.shards.writer import TEMPORARY

# Places and sizes of one machine, in which its processes may differ from others'.
OF_MACHINE = {
    "data_config.img_dir",
    "pretrained_model_name_or_path",
    "shards_dir",
    "state_dir",
    "shard_cache_dir",
    "shard_cache_gib",
    "num_processes",
}
SEEN_S = 30.0  # for a file to be seen on another machine: network disks cache what a folder holds


def check_same_start(world: World, settings: Settings) -> None:
    """Raise InputError when this process has other settings than process 0, or another version."""
    mine = _what_counts(settings)
    first = world.share(mine)
    for name in sorted(first.keys() | mine.keys()):
        if first.get(name) != mine.get(name):
            raise InputError(
                f"{name} is {first.get(name)!r} in process 0 and {mine.get(name)!r} in process "
                f"{world.rank}; start all processes with the same settings and the same version"
            )


def _what_counts(settings: Settings) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    found = {"the version of qwen-lora": __version__}
    for name, info in fields().items():
        if facts(info).command in ("precompute", "both") and name not in OF_MACHINE:
            section, _, key = name.rpartition(".")
            found[name] = (values[section] if section else values)[key]
    return found


def check_same_encoders(mine: Fingerprint, first: Fingerprint, world: World) -> None:
    """Raise InputError when this machine's model files are others than process 0's."""
    for part, own, other in (
        ("VAE", mine.vae_hash, first.vae_hash),
        ("text encoder", mine.text_hash, first.text_hash),
    ):
        if own != other:
            raise InputError(
                f"the {part} of process {world.rank} on {socket.gethostname()} is another than "
                "that of process 0; name the same model, with its @revision, on all machines"
            )


@contextmanager
def one_place(world: World, store: Store, settings: Settings) -> Iterator[None]:
    """Raise InputError where a folder of shards is not the one that process 0 writes to. A URL is
    the same everywhere."""
    if store.is_remote or world.size == 1:
        yield
        return
    if not world.first:
        name = world.share()
        _wait_for(store.scratch / name, world, settings)
        world.gather(True)
        yield
        return
    mark = store.scratch / f"{TEMPORARY}{secrets.token_hex(8)}.tmp"  # swept if this run is killed
    mark.touch()
    try:
        world.share(mark.name)
        world.gather(True)
        yield
    finally:
        mark.unlink(missing_ok=True)


def _wait_for(mark: Path, world: World, settings: Settings) -> None:
    until = time.monotonic() + SEEN_S
    while not mark.exists():
        world.check()
        if time.monotonic() > until:
            raise InputError(
                f"process {world.rank} on {socket.gethostname()} does not see the folder "
                f"{settings.shards_dir} that process 0 writes to; name a folder on a disk that "
                f"all machines share, or an s3:// URL, as {folder_option(settings)}"
            )
        time.sleep(0.05)


def resolve_by_turns(world: World, resolve: Callable[[], ModelFolder]) -> ModelFolder:
    """Process 0 first, then the first of each other machine, then all: what one has downloaded the
    others find in the cache."""
    model: ModelFolder | None = None
    for turn in (world.first, world.leads_other_node):
        if turn:
            model = resolve()
        world.meet()
    return resolve() if model is None else model
