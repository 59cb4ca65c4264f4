"""Writes shards on a thread of its own, one behind the encoders."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.format import Fingerprint, ShardEntry

if TYPE_CHECKING:
    from qwen_lora.shards.writer import EncodedSample


class BackgroundWriter:
    """At most one shard waits while the next is being encoded, so memory holds two.

    On an exception in the `with` block the shard at hand is still finished: it is whole.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, made_by: dict[str, Any]) -> None:
        self._folder, self._fingerprint, self._made_by = folder, fingerprint, made_by
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="qwen-lora-write")
        self._waiting: Future[ShardEntry] | None = None
        self._entries: list[ShardEntry] = []

    def submit(self, samples: list[EncodedSample]) -> None:
        """Write a shard, unless it is empty. Raises what the shard before failed with."""
        self._collect()
        if samples:
            self._waiting = self._pool.submit(self._write, samples)

    def finish(self) -> list[ShardEntry]:
        self._collect()
        return self._entries

    def _collect(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._entries.append(waiting.result())

    def _write(self, samples: list[EncodedSample]) -> ShardEntry:
        from qwen_lora.shards.writer import write_shard

        try:
            return write_shard(self._folder, samples, self._fingerprint, self._made_by)
        except OSError as error:
            raise QwenLoraError(
                f"cannot write to {self._folder}: {error.strerror or error}; finished shards are "
                "kept, the same command continues once it is put right"
            ) from error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)


def check_space(folder: Path, needed_bytes: int, free_bytes: int) -> None:
    """Raises InputError when the shards will not fit."""
    if needed_bytes > free_bytes:
        raise InputError(
            f"the shards need {mib(needed_bytes)} but {folder} has {mib(free_bytes)} free; make "
            "room or name another --output"
        )


def free_space(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    import shutil

    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
