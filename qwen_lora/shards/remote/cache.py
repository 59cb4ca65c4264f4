"""Verified copies of remote files on this machine's disk, by sha256; shared by processes.

A file is downloaded by one process at a time, under a lock of its own; the others find it there.
Its sha256 is checked before it gets its name. Whoever reads a copy holds a shared lock on it, and
what somebody reads is never evicted: files in use may exceed the limit, everything else may not.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qwen_lora.cache_folder import cache_folder
from qwen_lora.errors import QwenLoraError
from qwen_lora.hashing import sha256_file
from qwen_lora.posix import try_lock
from qwen_lora.shards.format import FileEntry
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError

GIB = 1 << 30
DEFAULT_GIB = 100.0
LEFT_FREE_BYTES = 2 * GIB  # on the disk, when what was written elsewhere is kept too
FETCHES = 3  # of one file whose content is not what the manifest says
_POLL_SECONDS = 0.05
_STALE_SECONDS = 3600.0  # a partial download that nobody goes on with

Download = Callable[[BinaryIO], None]  # appends what is missing


class ShardCache:
    """Copies of files in a folder, of at most about `most_bytes`. Safe to share by processes and
    threads; needs no torch."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    @classmethod
    def default(cls, folder: Path | None = None, most_gib: float = DEFAULT_GIB) -> ShardCache:
        """In `folder`, else in `shards` of this machine's cache (`~/.cache/qwen-lora`)."""
        return cls(folder or cache_folder("shards"), int(most_gib * GIB))

    def held(self, entry: FileEntry) -> BinaryIO | None:
        """The whole copy, open, unbuffered and kept from eviction until it is closed; or None."""
        try:
            file = open(self._copy(entry), "rb", buffering=0)
        except FileNotFoundError:
            return None
        try:
            facts = os.fstat(file.fileno())
            if try_lock(file, shared=True) and facts.st_nlink and facts.st_size == entry.bytes:
                os.utime(self._copy(entry))  # eviction takes the least recently opened
                return file
        except FileNotFoundError:  # evicted between the two
            pass
        file.close()
        return None

    def get(
        self,
        entry: FileEntry,
        download: Download,
        check: Callable[[], None],
        what: str,
        *,
        wait: bool = True,
    ) -> BinaryIO | None:
        """The copy, as `held`, downloaded if it is not there.

        While another process or thread downloads it, this waits and calls `check`, which may raise;
        with `wait` false it returns None instead. Raises RemoteError when the content stays wrong,
        QwenLoraError when the disk refuses it, and what `download` raises.
        """
        while True:
            try:
                if (file := self.held(entry)) is not None:
                    return file
                self._copy(entry).parent.mkdir(parents=True, exist_ok=True)
                with _Lock(self._copy(entry).with_suffix(".lock")) as lock:
                    if lock.taken:
                        held = self.held(entry)
                        return held or self._download(entry, download, check, what)
            except OSError as error:
                raise QwenLoraError(
                    f"cannot keep downloads in {self.folder}: {error.strerror or error}; free "
                    "space there, or name another folder with the setting shard_cache_dir or "
                    "with QWEN_LORA_CACHE"
                ) from error
            if not wait:
                return None
            check()
            time.sleep(_POLL_SECONDS)

    def arrived(self, entry: FileEntry) -> int:
        """Bytes of a download so far."""
        for path in (self._copy(entry).with_suffix(".part"), self._copy(entry)):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                pass
        return 0

    def add(self, entry: FileEntry, source: Path) -> None:
        """Move a file whose content is known to be right into the cache. It can be had again: a
        disk that refuses it, or that has little room left, gets none."""
        copy = self._copy(entry)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(entry.bytes)
            if shutil.disk_usage(self.folder).free >= LEFT_FREE_BYTES:
                _move(source, copy)
        except OSError:
            pass

    def discard_damaged(self, entry: FileEntry) -> bool:
        """Remove the copy if its content is wrong, as a disk may make it. False if it is right."""
        copy = self._copy(entry)
        try:
            if copy.stat().st_size == entry.bytes and sha256_file(copy) == entry.sha256:
                return False
        except FileNotFoundError:  # another reader was faster
            return True
        copy.unlink(missing_ok=True)
        return True

    # ---- the folder ------------------------------------------------------------------------------

    def _copy(self, entry: FileEntry) -> Path:
        return self.folder / entry.sha256[:2] / entry.sha256

    def _download(
        self, entry: FileEntry, download: Download, check: Callable[[], None], what: str
    ) -> BinaryIO:
        """Under the file's lock. Goes on with what an interrupted download left."""
        copy = self._copy(entry)
        part = copy.with_suffix(".part")
        found = ""
        for _ in range(FETCHES):
            self._make_room(entry.bytes)
            try:
                with open(part, "ab") as file:
                    if file.tell() > entry.bytes:
                        file.truncate(0)
                        file.seek(0)
                    download(file)
                    file.flush()
                    os.fsync(file.fileno())
                check()
                found = sha256_file(part)
                if found == entry.sha256:
                    return self._take_in(part, copy)
            except ChangedRemotely:
                pass
            part.unlink(missing_ok=True)
        came = f"sha256 {found[:12]}" if found else "another object"
        raise RemoteError(
            f"{what}: {FETCHES} times {came} arrived, the manifest says {entry.sha256[:12]}; "
            "the remote copy is damaged or is being changed: copy it there again"
        )

    def _take_in(self, part: Path, copy: Path) -> BinaryIO:
        file = open(part, "rb", buffering=0)
        try:
            try_lock(file, shared=True)  # before it has a name under which it could be evicted
            os.replace(part, copy)
            os.utime(copy)
        except BaseException:
            file.close()
            raise
        return file

    def _make_room(self, more: int) -> None:
        """Evict the least recently used until `more` bytes fit, or all that is left is in use."""
        files = []
        for path in self.folder.glob("??/*"):
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            files.append((facts.st_mtime, facts.st_size, path))
        used = sum(size for _, size, _ in files)
        now = time.time()
        for changed, size, path in sorted(files):
            stale = path.suffix == ".part" and now - changed > _STALE_SECONDS
            if not stale and (path.suffix or used + more <= self.most_bytes):
                continue
            if _remove_unused(path):
                used -= size


class _Lock:
    """An exclusive lock on a file of its own, if it can be had at once; the file is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab")
        self.taken = try_lock(self._file, shared=False) and _is_still(self._file, path)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.taken:
            self._path.unlink(missing_ok=True)  # while it is held: nobody locks a file without name
        self._file.close()


def _is_still(file: BinaryIO, path: Path) -> bool:
    """Whether `path` is the open file and not a newer one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _move(source: Path, copy: Path) -> None:
    """Rename, from another disk too; `copy` is whole or absent."""
    try:
        os.replace(source, copy)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = copy.with_suffix(f".{secrets.token_hex(6)}.part")
        try:
            shutil.copyfile(source, part)
            os.replace(part, copy)
        finally:
            part.unlink(missing_ok=True)


def _remove_unused(path: Path) -> bool:
    """Unlink a file that nobody reads or writes."""
    try:
        with open(path, "rb") as file:
            if not try_lock(file, shared=False):
                return False
            path.unlink()
            return True
    except (FileNotFoundError, PermissionError):
        return False
