"""Writes shards on a thread of its own, one behind the encoders."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.format import Fingerprint, ShardEntry
from qwen_lora.shards.store import Store

if TYPE_CHECKING:
    from qwen_lora.shards.writer import EncodedSample

FINISH_S = 20.0
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class BackgroundWriter:
    """At most one shard waits while the next is being encoded, so memory holds two.

    On an exception in the `with` block the shard at hand is still finished: it is whole. A remote
    store that does not take it within FINISH_S is no longer waited for.
    """

    def __init__(self, store: Store, fingerprint: Fingerprint, made_by: dict[str, Any]) -> None:
        self._store, self._fingerprint, self._made_by = store, fingerprint, made_by
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="qwen-lora-write")
        self._waiting: Future[ShardEntry] | None = None
        self._last: Future[ShardEntry] | None = None
        self._entries: list[ShardEntry] = []

    def submit(self, samples: list[EncodedSample]) -> None:
        """Write a shard, unless it is empty. Raises what the shard before failed with."""
        self._collect()
        if samples:
            self._waiting = self._last = self._pool.submit(self._write, samples)

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
            return write_shard(self._store, samples, self._fingerprint, self._made_by)
        except OSError as error:
            remote = self._store.is_remote  # then it was its temporary
            where = self._store.scratch if remote else self._store.label
            raise QwenLoraError(
                f"cannot write to {where}: {error.strerror or error}; finished shards "
                "are kept, the same command continues once it is put right"
            ) from error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._last is not None:
            wait([self._last], timeout=FINISH_S)
        with self._store.interrupted() if kind is not None else nullcontext():
            self._pool.shutdown(wait=True)


@contextmanager
def output_errors(folder: Path, kind: type[QwenLoraError], advice: str) -> Iterator[None]:
    """An OSError about `folder`, or about the room on its disk, becomes a `kind` in one line."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else ""
        about_folder = bool(named) and Path(named).absolute().is_relative_to(folder.absolute())
        if not about_folder and error.errno not in DISK_TROUBLE:
            raise
        reason = error.strerror or type(error).__name__
        raise kind(f"the output {folder} cannot be used: {reason}; {advice}") from error


def check_space(folder: Path, needed_bytes: int, free_bytes: int, option: str) -> None:
    """Raises InputError when the shards will not fit."""
    if needed_bytes > free_bytes:
        raise InputError(
            f"the shards need {mib(needed_bytes)} but {folder} has {mib(free_bytes)} free; make "
            f"room or name another {option}"
        )


def free_space(folder: Path) -> int:
    """Bytes free where `folder` is or will be. Raises InputError when a file is in its place."""
    import shutil

    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"the output {folder} cannot be used: {existing} is a file; name a folder")
    return shutil.disk_usage(existing).free


def mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
