"""Where the files of one shard set lie: a folder, or a URL. Names are always bare file names.

A store moves bytes. What they must be is the manifest's to say: `manifest` and `reader` check
hashes. Functions that take a `Place` accept a folder, a URL or an open store.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qwen_lora.errors import InputError, ShardError
from qwen_lora.posix import make_folder, publish_file, write_atomic
from qwen_lora.shards.format import FileEntry

if TYPE_CHECKING:
    from qwen_lora.shards.remote.cache import ShardCache

LOCAL = ".local"  # this machine's own part of a set's folder
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FOLDED_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib has folded the double slash


class Store(ABC):
    """The files of one set. Safe to use from several threads."""

    label: str  # what people call it; no secret in it
    is_remote = False
    open_files = 64  # shards held open at once by one reader

    def where(self, name: str) -> str:
        """A file's name for messages."""
        return f"{self.label}/{name}"

    # ---- reading ---------------------------------------------------------------------------------

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything that could hold a set: a folder, a server that answers."""

    @abstractmethod
    def read(self, name: str, most_bytes: int) -> bytes:
        """A whole small file, as it is now. Raises FileNotFoundError, ShardError for a longer one
        and for what is no regular file."""

    @abstractmethod
    def check(self, file: FileEntry) -> None:
        """Raises ShardError unless a listed file is there with its length; a remote one is looked
        at when it is first opened, not here."""

    def prepare(self, files: Iterable[FileEntry]) -> None:  # noqa: B027 - most need nothing
        """Have small listed files at hand: a remote store fetches them side by side."""

    @abstractmethod
    def open(self, file: FileEntry) -> BinaryIO:
        """A listed file of exactly `file.bytes` bytes, for reading at any position, unbuffered; its
        content is for the caller to check. Waits for a remote one to arrive, whose sha256 has
        then been checked. Raises ShardError when it is missing or of another length."""

    def read_listed(self, file: FileEntry) -> bytes:
        """A small listed file, whole; as `open`."""
        with self.open(file) as opened:
            return opened.read()

    def repair(self, file: FileEntry) -> bool:
        """Drop a damaged copy that the next `open` can fetch again. False when there is no other to
        be had, or the copy is right."""
        return False

    def fresh(self) -> Store:
        """The same files as they are at their source now: no copy that was checked before."""
        return self

    @abstractmethod
    def open_unlisted(self, name: str, size: int) -> BinaryIO:
        """A file of `size` bytes that no manifest vouches for, unbuffered: the caller checks it.
        Raises ShardError when it is missing or of another length."""

    @abstractmethod
    def names(self) -> list[str] | None:
        """The names there are, sorted; None where they cannot be listed."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is missing, or would have to be fetched to know."""
        return None

    # ---- writing ---------------------------------------------------------------------------------

    def check_writable(self) -> None:  # noqa: B027 - a folder says so itself
        """Raises InputError where files can only be read, never written or deleted."""

    def check_permission(self) -> None:  # noqa: B027 - a folder says so itself
        """Raises what a remote store would refuse the first upload with, before there is one."""

    @property
    @abstractmethod
    def scratch(self) -> Path:
        """A local folder for temporaries, on the same disk as a local set."""

    @abstractmethod
    def publish(self, temporary: Path, file: FileEntry, resumed: bool = False) -> None:
        """Give a finished, fsynced file of `scratch` its content name; it leaves `scratch`.
        `resumed`: a remote store may take a file of that name and length to be it."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all, and durably."""

    def create(self, name: str, data: bytes) -> bool:
        """As `write`; a remote store writes nothing and says False when other bytes have the name.
        A local one is written by whoever holds its lock."""
        self.write(name, data)
        return True

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While the block runs, nobody waits for a download: calls that would, raise."""
        yield

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and locks."""


Place = str | Path | Store


class FolderStore(Store):
    """A set in a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.label = str(folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def exists(self) -> bool:
        return self.folder.is_dir()

    def check_writable(self) -> None:
        there = next((path for path in (self.folder, *self.folder.parents) if path.exists()), None)
        if there is not None and not there.is_dir():
            raise InputError(f"{self.folder} can hold no shard set: {there} is a file")

    def read(self, name: str, most_bytes: int) -> bytes:
        path = self.folder / name
        with _readable(path):
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):  # a named pipe would be waited for
                raise ShardError(f"{path} is not a regular file")
            if facts.st_size > most_bytes:
                raise ShardError(f"{path}: {facts.st_size} bytes are more than it can have")
            return path.read_bytes()

    def check(self, file: FileEntry) -> None:
        check_length(self.folder / file.name, file.bytes)

    def open(self, file: FileEntry) -> BinaryIO:
        return self.open_unlisted(file.name, file.bytes)

    def open_unlisted(self, name: str, size: int) -> BinaryIO:
        check_length(self.folder / name, size)
        with _readable(self.folder / name):
            return open(self.folder / name, "rb", buffering=0)

    def names(self) -> list[str] | None:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    @property
    def scratch(self) -> Path:
        return own_folder(self.folder / LOCAL)

    def publish(self, temporary: Path, file: FileEntry, resumed: bool = False) -> None:
        publish_file(temporary, self.folder / file.name)

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / name, data, self.scratch)

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held."""


def own_folder(path: Path) -> Path:
    """A set's `.local`, made if need be. Raises InputError for a link: whoever made the set would
    choose where this machine writes and sweeps."""
    if path.is_symlink():
        raise InputError(f"{path} is a link: remove it, a folder is made in its place")
    make_folder(path)
    return path


def open_store(place: Place, cache: ShardCache | None = None) -> Store:
    """The store at a folder or URL, whose files are kept in `cache`; a store is returned as it is.

    Raises InputError for a URL that this installation cannot read, and for no place at all.
    """
    if isinstance(place, Store):
        return place
    if not str(place):  # pathlib would take it for the folder that we are in
        raise InputError("the name of the shard set is empty: name its folder or URL")
    url = as_url(place)
    if url is None:
        return FolderStore(Path(place))
    from qwen_lora.shards.remote.store import open_remote_store

    return open_remote_store(url, cache)


@contextmanager
def opened_store(place: Place) -> Iterator[Store]:
    """As `open_store`; closed at the end unless the caller's own store was given."""
    store = open_store(place)
    try:
        yield store
    finally:
        if store is not place:
            store.close()


def as_url(place: str | Path) -> str | None:
    """The URL that `place` is, if it is one. Raises InputError for a URL given as a Path, and for
    one with a slash too few."""
    if isinstance(place, str):
        if _URL.match(place):
            return place
        if _FOLDED_URL.match(place) and not Path(place).exists():
            raise InputError(f"{place} is no folder here, and a URL has two slashes: ://")
        return None
    if _FOLDED_URL.match(place.as_posix()):
        raise InputError(f"{place.as_posix()} looks like a URL: give it as text, not as a path")
    return None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system says against reading a file, in one line; a missing one is the caller's."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error


def check_length(path: Path, expected: int) -> None:
    """Raises ShardError unless `path` is a regular file of the length that the manifest says."""
    try:
        with _readable(path):
            found = path.stat()
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; copy it again from its source") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
        raise ShardError(
            f"{path} has {found.st_size} bytes, the manifest says {expected}; "
            "copy it again from its source"
        )
