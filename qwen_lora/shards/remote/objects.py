"""Shard sets in object stores, through fsspec: s3 with s3fs, others with what is installed.

`Objects` makes one attempt at one request; `ObjectRemote` repeats, resumes and compares.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from qwen_lora.errors import InputError
from qwen_lora.redact import without_secrets
from qwen_lora.shards.remote.base import ChangedRemotely, Remote, RemoteError, never_stop
from qwen_lora.shards.remote.retries import Patience, Retries, Transient

INSTALL = "pip install 'qwen-lora[remote]'"
ONE_PUT_BYTES = 32 << 20  # longer files go up in parts
T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """An object as the store tells of it: its length and the version of its content."""

    size: int
    version: str | None


@dataclass(frozen=True)
class Answer:
    """An object, or its end: `chunks` gives the bytes from the asked position on."""

    facts: Facts
    chunks: Generator[bytes]


class Objects(ABC):
    """One attempt at each request to one store; names are bare.

    All raise Transient for what may pass, FileNotFoundError, ChangedRemotely for a condition that
    does not hold, RemoteError for what stays wrong, InputError for missing credentials.
    """

    @abstractmethod
    def head(self, name: str) -> Facts: ...

    @abstractmethod
    def get(self, name: str, start: int, version: str | None) -> Answer:
        """From byte `start` of the object, if it still has `version` (None: whichever)."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> str | None:
        """Whole or not at all; returns the version."""

    @abstractmethod
    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """As `put`, but only over `version` (None: over nothing)."""

    @abstractmethod
    def upload(self, name: str, source: Path, attempts: Attempts) -> None:
        """A long file, whole or not at all; repeats its own parts with `attempts`."""

    def check_permission(self) -> None:  # noqa: B027 - most can only be tried
        """As `Remote.check_permission`."""

    @abstractmethod
    def delete(self, name: str) -> None: ...

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True)
class Attempts:
    """Makes a request until it is answered, at most so often."""

    what: str
    patience: Patience
    check: Callable[[], None]

    def __call__(self, request: Callable[[], T]) -> T:
        retries = Retries(self.what, self.patience, self.check)
        while True:
            self.check()
            try:
                return request()
            except Transient as error:
                retries.failed(error)


class ObjectRemote(Remote):
    """The objects of one set under one prefix of a store."""

    def __init__(self, label: str, objects: Objects, patience: Patience = Patience()) -> None:  # noqa: B008
        self.label = label
        self._objects, self._patience = objects, patience
        self._versions: dict[str, str | None] = {}  # of the objects that fetches have begun
        self._lock = threading.Lock()

    def read(
        self, name: str, most_bytes: int, check: Callable[[], None] = never_stop
    ) -> tuple[bytes, str | None]:
        return self._attempts(name, check)(lambda: self._read(name, most_bytes, check))

    def _read(
        self, name: str, most_bytes: int, check: Callable[[], None]
    ) -> tuple[bytes, str | None]:
        answer = self._objects.get(name, 0, None)
        with closing(answer.chunks):
            if answer.facts.size > most_bytes:
                raise RemoteError(
                    f"{self.where(name)}: {answer.facts.size} bytes are more than it can have"
                )
            data = bytearray()
            for chunk in answer.chunks:
                data += chunk
                check()
                if len(data) > answer.facts.size:
                    break
        if len(data) != answer.facts.size:
            raise Transient(f"{len(data)} of {answer.facts.size} bytes came")
        return bytes(data), answer.facts.version

    def fetch(
        self, name: str, size: int, file: BinaryIO, check: Callable[[], None] = never_stop
    ) -> None:
        retries = Retries(self.where(name), self._patience, check)
        while (start := file.tell()) < size:
            check()
            try:
                self._fetch(name, start, size, file, retries, check)
            except Transient as error:
                retries.failed(error)
        if file.tell() > size:
            raise ChangedRemotely(f"{self.where(name)}: {file.tell()} bytes are there of {size}")

    def _fetch(
        self,
        name: str,
        start: int,
        size: int,
        file: BinaryIO,
        retries: Retries,
        check: Callable[[], None],
    ) -> None:
        with self._lock:
            version = self._versions.get(name) if start else None
        answer = self._objects.get(name, start, version)
        with closing(answer.chunks):
            if answer.facts.size != size:
                raise ChangedRemotely(
                    f"{self.where(name)} has {answer.facts.size} bytes, {size} are expected"
                )
            with self._lock:
                self._versions[name] = answer.facts.version
            left = size - start
            for chunk in answer.chunks:
                file.write(chunk[:left])
                file.flush()
                left -= min(left, len(chunk))
                retries.arrived(len(chunk))
                check()
                if not left:
                    return
        raise Transient(f"the connection ended at byte {size - left} of {size}")

    def names(self) -> list[str] | None:
        try:
            return sorted(self._attempts("", never_stop)(self._objects.names))
        except FileNotFoundError:
            return []
        except NotListed:
            return None

    def put(
        self,
        name: str,
        source: Path | bytes,
        check: Callable[[], None] = never_stop,
        resumed: bool = False,
    ) -> None:
        attempts = self._attempts(name, check)
        if isinstance(source, bytes):  # small: cheaper sent again than asked for
            attempts(lambda: self._objects.put(name, source))
            return
        size = source.stat().st_size
        try:
            if resumed and attempts(lambda: self._objects.head(name)).size == size:
                return
        except FileNotFoundError:
            pass
        if size > ONE_PUT_BYTES:
            self._objects.upload(name, source, attempts)
            return
        data = source.read_bytes()
        attempts(lambda: self._objects.put(name, data))

    def replace(self, name: str, data: bytes, version: str | None) -> str | None:
        """As Remote says. Atomic where the store knows conditional writes, as S3 does; elsewhere
        the object is read and compared right before it is written."""
        attempts = self._attempts(name, never_stop)
        try:
            return attempts(lambda: self._objects.put_if(name, data, version))
        except ChangedRemotely:
            # An answer may have been lost on its way: then the object is the one written here.
            try:
                if attempts(lambda: self._objects.head(name)).size == len(data):
                    there, its_version = self.read(name, len(data))
                    if there == data:
                        return its_version
            except FileNotFoundError:
                pass
            raise

    def check_permission(self) -> None:
        self._attempts("", never_stop)(self._objects.check_permission)

    def delete(self, name: str) -> None:
        try:
            self._attempts(name, never_stop)(lambda: self._objects.delete(name))
        except FileNotFoundError:
            pass

    def close(self) -> None:
        self._objects.close()

    def _attempts(self, name: str, check: Callable[[], None]) -> Attempts:
        return Attempts(self.where(name) if name else self.label, self._patience, check)


class NotListed(RemoteError):
    """The store does not let this user list."""


def open_object_remote(url: str, patience: Patience = Patience()) -> ObjectRemote:  # noqa: B008
    """The set at an object store's URL: s3://bucket/folder, or another protocol of fsspec's.

    Credentials come from the environment or the files of the store's own tools, never from the URL.
    Raises InputError for a URL with a password, query or no bucket, and for a protocol that is not
    installed.
    """
    label = without_secrets(url).rstrip("/")
    parts = urlsplit(url)
    if parts.password is not None or (parts.scheme == "s3" and "@" in parts.netloc):
        raise InputError(
            f"{label}: a key or password does not belong into a URL; put it into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    if parts.query or parts.fragment:
        raise InputError(f"{label}: an object store's URL has no part after ? or #")
    try:
        if parts.scheme in ("s3", "s3a"):
            from qwen_lora.shards.remote.s3 import S3Objects

            if not parts.netloc:
                raise InputError(f"{url} names no bucket: s3://bucket/folder")
            return ObjectRemote(
                label, S3Objects(parts.netloc, parts.path, label, patience.stall_s), patience
            )
        from qwen_lora.shards.remote.any_store import FsspecObjects

        return ObjectRemote(label, FsspecObjects(url, label), patience)
    except ImportError as error:
        if parts.scheme in ("s3", "s3a"):
            raise InputError(f"{label} needs s3fs: {INSTALL}") from None
        raise InputError(f"{label} needs one more package of fsspec's: {error}") from None
