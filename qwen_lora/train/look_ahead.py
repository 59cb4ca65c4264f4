"""Downloads what a plan will read next from remote shard sets, ahead of the reader. No torch.

It only fills the cache: what is read, and in which order, is the plan's alone. A download that
fails here is tried again by the reader that needs it, which says what is wrong.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.format import FileEntry
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.store import RemoteStore

THREADS = 4
MOST_MICRO_BATCHES = 10_000  # planned ahead of the one in use

RemoteFile = tuple[RemoteStore, FileEntry]


class LookAhead:
    """Fetches the files of micro-batches in order, up to `most_bytes` beyond the one in use.

    `work` yields the remote files of each micro-batch, however often; it is iterated in a thread.
    """

    def __init__(self, work: Iterator[Iterable[RemoteFile]], most_bytes: int) -> None:
        self._work, self._most_bytes = work, most_bytes
        self._changed = threading.Condition()
        self._used = -1  # the last micro-batch that was handed out
        self._ahead: deque[tuple[int, int]] = deque()  # (first micro-batch that reads it, bytes)
        self._ahead_bytes = 0
        self._closed = False
        self._files: SimpleQueue[RemoteFile | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._scan, name="qwen-lora-plan-ahead", daemon=True),
            *(
                threading.Thread(target=self._fetch, name="qwen-lora-fetch-ahead", daemon=True)
                for _ in range(THREADS)
            ),
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, micro_batch: int) -> None:
        """The micro-batch of that number, counted from 0, is in use."""
        with self._changed:
            self._used = micro_batch
            while self._ahead and self._ahead[0][0] <= micro_batch:
                self._ahead_bytes -= self._ahead.popleft()[1]
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; downloads under way stop, and a later one goes on with their bytes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in range(THREADS):
            self._files.put(None)
        for thread in self._threads:
            thread.join()

    def _scan(self) -> None:
        """Queue each file before the first micro-batch that reads it, and again when its last known
        reader is past: it may have been evicted since."""
        last: dict[tuple[str, str], int] = {}
        for number, files in enumerate(self._work):
            if not self._wait_for_room(number):
                return
            for store, file in files:
                key = (store.label, file.name)
                known = last.get(key, -1)
                last[key] = number
                if known > self._used or known == number:
                    continue
                with self._changed:
                    self._ahead.append((number, file.bytes))
                    self._ahead_bytes += file.bytes
                self._files.put((store, file))

    def _wait_for_room(self, number: int) -> bool:
        """False when closed."""

        def ready() -> bool:
            near = number - self._used <= MOST_MICRO_BATCHES
            return self._closed or (near and self._ahead_bytes < self._most_bytes)

        with self._changed:
            self._changed.wait_for(ready)
            return not self._closed

    def _fetch(self) -> None:
        while (item := self._files.get()) is not None:
            if self._closed:
                return
            store, file = item
            with suppress(QwenLoraError, OSError):  # the reader that needs it will say it
                store.fetch_ahead(file, self._check)

    def _check(self) -> None:
        if self._closed:
            raise QwenLoraError("the look-ahead was closed")


def remote_bytes(sets: Iterable[ShardSet]) -> int:
    """Bytes of all remote sets' shards."""
    return sum(
        entry.tar.bytes + entry.sidecar.bytes
        for shard_set in sets
        if shard_set.store.is_remote
        for entry in shard_set.manifest.shards
    )


def check_cache_holds(
    sets: Iterable[ShardSet], shuffle: str, block_shards: int, most_bytes: int
) -> None:
    """Raises InputError when remote sets cannot be trained from through a cache of `most_bytes`
    without fetching them over and over."""
    remote = [shard_set for shard_set in sets if shard_set.store.is_remote]
    total = remote_bytes(remote)
    if total <= most_bytes:
        return
    held = f"the remote shard sets have {_gib(total)} GiB, the cache {_gib(most_bytes)}"
    if shuffle == "full":
        raise InputError(
            f"{held}: set `shuffle: block`, which reads {block_shards} shards at a time, or "
            f"`shard_cache_gib: {_gib(total)}`"
        )
    largest = max(entry.tar.bytes for one in remote for entry in one.manifest.shards)
    needed = 2 * block_shards * largest  # the block in use and the next one
    if needed > most_bytes:
        raise InputError(
            f"{held}, less than two blocks of {block_shards} shards need: set "
            f"`shard_cache_gib: {_gib(needed)}`"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30 + 0.05:.1f}"
