"""A shard set behind a URL as a store: a protocol below, the shared cache beside it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qwen_lora.cache_folder import cache_folder
from qwen_lora.errors import QwenLoraError, ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import FileEntry
from qwen_lora.shards.remote.base import ChangedRemotely, Remote
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.store import Store

FETCH_THREADS = 16  # for small files, where waiting for answers is all there is to do
SAY_SECONDS = 10.0  # between lines about a file that somebody waits for
_GIVE_WAY_SECONDS = 0.01
_MANIFEST = "manifest.json"


class RemoteStore(Store):
    """The files of a remote set, listed ones through the cache: their sha256 is checked when they
    arrive. `state` is the local folder for what a local set keeps in `.local/`."""

    is_remote = True
    open_files = 24  # what is open cannot be evicted

    def __init__(self, remote: Remote, cache: ShardCache, state: Path | None = None) -> None:
        self.remote, self.cache = remote, cache
        self.label = remote.label
        self._state = state or default_state(remote.label)
        self._version: str | None = None  # of manifest.json as it was last read or written
        self._urgent: list[str] = []  # names that somebody waits for
        self._closed = False
        self._interruptions = 0

    def where(self, name: str) -> str:
        return self.remote.where(name)

    # ---- reading ---------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Reading will tell; a URL without a set is one without a manifest."""
        return True

    def read(self, name: str, most_bytes: int) -> bytes:
        if name == _MANIFEST:
            self._version = None  # unless there is one
        data, version = self.remote.read(name, most_bytes, self._check)
        if name == _MANIFEST:
            self._version = version
        return data

    def check(self, file: FileEntry) -> None:
        """Nothing: what is missing or shorter shows when it is fetched."""

    def prepare(self, files: Iterable[FileEntry]) -> None:
        def have(file: FileEntry) -> None:
            self.open(file).close()

        with ThreadPoolExecutor(FETCH_THREADS, "qwen-lora-fetch") as pool:
            waiting = [pool.submit(have, file) for file in files]
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def open(self, file: FileEntry) -> BinaryIO:
        self._urgent.append(file.name)
        try:
            opened = self._get(file, _Waiting(self, file).check)
        finally:
            self._urgent.remove(file.name)
        assert opened is not None  # it was waited for
        return opened

    def fetch_ahead(self, file: FileEntry, check: Callable[[], None]) -> None:
        """Have a file in the cache for a later `open`; no error if another fetches it already.
        Leaves the line to files that somebody waits for."""

        def give_way() -> None:
            check()
            while self._urgent and file.name not in self._urgent:
                time.sleep(_GIVE_WAY_SECONDS)
                check()

        opened = self._get(file, give_way, wait=False)
        if opened is not None:
            opened.close()

    def _get(
        self, file: FileEntry, check: Callable[[], None], wait: bool = True
    ) -> BinaryIO | None:
        def download(part: BinaryIO) -> None:
            try:
                self.remote.fetch(file.name, file.bytes, part, check)
            except FileNotFoundError:
                raise ShardError(
                    f"{self.where(file.name)} is missing; the set was pruned or copied in part: "
                    "copy it there again from its source"
                ) from None

        return self.cache.get(file, download, check, self.where(file.name), wait=wait)

    def read_listed(self, file: FileEntry) -> bytes:
        data = super().read_listed(file)
        if sha256_hex(data) != file.sha256 and self.repair(file):
            return super().read_listed(file)
        return data

    def repair(self, file: FileEntry) -> bool:
        return self.cache.discard_damaged(file)

    def open_unlisted(self, name: str, size: int) -> BinaryIO:
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            try:
                self.remote.fetch(name, size, file, self._check)
            except FileNotFoundError:
                raise ShardError(f"{self.where(name)} is missing") from None
            except ChangedRemotely as error:
                raise ShardError(str(error)) from None
            opened = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
            opened.seek(0)
            return opened

    def fresh(self) -> Store:
        return _FreshStore(self.remote, self.cache, self._state)

    def names(self) -> list[str] | None:
        return self.remote.names()

    # ---- writing ---------------------------------------------------------------------------------

    def check_writable(self) -> None:
        self.remote.check_writable()

    @property
    def scratch(self) -> Path:
        self._state.mkdir(parents=True, exist_ok=True)
        return self._state

    def check_permission(self) -> None:
        self.remote.check_permission()

    def publish(self, temporary: Path, file: FileEntry, resumed: bool = False) -> None:
        try:
            self.remote.put(file.name, temporary, self._check, resumed)
            self.cache.add(file, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Raises ChangedRemotely when `manifest.json` is not the one that was read last."""
        if name == _MANIFEST:
            self._version = self.remote.replace(name, data, self._version)
        else:
            self.remote.put(name, data, self._check)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self.remote.replace(name, data, None)
        except ChangedRemotely:
            return False
        return True

    def delete(self, name: str) -> None:
        self.remote.delete(name)

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        self._interruptions += 1
        try:
            yield
        finally:
            self._interruptions -= 1

    def close(self) -> None:
        """Downloads under way end with an error."""
        self._closed = True
        self.remote.close()

    def _check(self) -> None:
        if self._closed or self._interruptions:
            raise QwenLoraError(f"{self.label}: waiting for a download was called off")


class _FreshStore(RemoteStore):
    """Past the cache: every file comes from its source, each time."""

    def open(self, file: FileEntry) -> BinaryIO:
        return self.open_unlisted(file.name, file.bytes)

    def prepare(self, files: Iterable[FileEntry]) -> None:
        """Nothing is kept, so nothing can be prepared."""


class _Waiting:
    """Somebody waits for a file: says so now and then."""

    def __init__(self, store: RemoteStore, file: FileEntry) -> None:
        self._store, self._file = store, file
        self._next = time.monotonic() + SAY_SECONDS

    def check(self) -> None:
        self._store._check()
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + SAY_SECONDS
        done, total = self._store.cache.arrived(self._file), self._file.bytes
        print(
            f"waiting for {self._store.where(self._file.name)}: "
            f"{done >> 20} of {total >> 20} MiB are here",
            file=sys.stderr,
        )


def default_state(label: str) -> Path:
    """The local folder for what belongs to a remote set on this machine: temporaries, locks."""
    return cache_folder("state") / sha256_hex(label.encode())[:16]


def open_remote_store(
    url: str, cache: ShardCache | None = None, state: Path | None = None
) -> RemoteStore:
    """`cache` and `state` default to folders in this machine's cache.

    Raises InputError for a protocol that this installation lacks."""
    from qwen_lora.shards.remote import open_remote

    return RemoteStore(open_remote(url), cache or ShardCache.default(), state)
