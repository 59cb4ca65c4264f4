"""Stores that fsspec reads with a package of their own: gs, az, sftp and so on.

They are asked in the few ways that all of fsspec's file systems share, so a conditional write is a
comparison right before the write: two programs that publish at the same moment may both think that
they were first. S3 has no such gap.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError
from qwen_lora.shards.remote.objects import Answer, Attempts, Facts, Objects
from qwen_lora.shards.remote.retries import Transient

CHUNK_BYTES = 8 << 20
# Where an object is there whole or not at all; elsewhere files are written aside and renamed.
ATOMIC = {"gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
VERSION_KEYS = ("etag", "ETag", "generation", "md5Hash", "content_md5", "mtime", "created")
T = TypeVar("T")


class FsspecObjects(Objects):
    """The files of one folder. Raises ImportError where fsspec lacks the protocol's package."""

    def __init__(self, url: str, label: str) -> None:
        self._label = label
        protocol = url.partition("://")[0]
        self._atomic = protocol in ATOMIC
        try:
            self._files, folder = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except ValueError as error:  # an unknown protocol
            raise InputError(f"{label} cannot be opened: {error}") from None
        self._folder = folder.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _ask(self, request: Callable[[], T]) -> T:
        """Each package has errors of its own; what is not understood is tried again."""
        try:
            return request()
        except (FileNotFoundError, QwenLoraError):
            raise
        except PermissionError as error:
            raise RemoteError(f"{self._label}: access denied ({type(error).__name__})") from None
        except Exception as error:
            raise Transient(type(error).__name__) from error

    def head(self, name: str) -> Facts:
        facts: dict[str, Any] = self._ask(lambda: self._files.info(self._path(name)))
        version = next((str(facts[key]) for key in VERSION_KEYS if facts.get(key)), None)
        return Facts(int(facts["size"]), version)

    def get(self, name: str, start: int, version: str | None) -> Answer:
        facts = self.head(name)
        if version is not None and facts.version != version:
            raise ChangedRemotely(f"{self._label}/{name} is not what it was")
        return Answer(facts, self._chunks(name, start, facts))

    def _chunks(self, name: str, start: int, facts: Facts) -> Generator[bytes]:
        for begin in range(start, facts.size, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, facts.size)

            def part(begin: int = begin, end: int = end) -> bytes:
                data: bytes = self._files.cat_file(self._path(name), start=begin, end=end)
                return data

            data = self._ask(part)
            if len(data) != end - begin:
                raise Transient(f"{len(data)} of {end - begin} bytes came")
            yield data
        if self.head(name) != facts:
            raise ChangedRemotely(f"{self._label}/{name} changed while it was read")

    def put(self, name: str, data: bytes) -> str | None:
        self._write(name, lambda path: self._files.pipe_file(path, data))
        return self.head(name).version

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        try:
            if self.head(name).version != version:
                raise ChangedRemotely(f"{self._label}/{name} was written by somebody else")
        except FileNotFoundError:
            if version is not None:
                raise ChangedRemotely(f"{self._label}/{name} is gone") from None
        return self.put(name, data)

    def upload(self, name: str, source: Path, attempts: Attempts) -> None:
        attempts(lambda: self._write(name, lambda path: self._files.put_file(str(source), path)))

    def _write(self, name: str, write: Callable[[str], None]) -> None:
        if self._atomic:
            self._ask(lambda: write(self._path(name)))
            return
        aside = self._path(f".{name}-{secrets.token_hex(6)}.part")
        self._ask(lambda: self._files.makedirs(self._folder, exist_ok=True))
        try:
            self._ask(lambda: write(aside))
            self._ask(lambda: self._files.mv(aside, self._path(name)))
        except BaseException:
            try:
                self._files.rm_file(aside)
            except Exception:  # there is none, or the store is gone
                pass
            raise

    def delete(self, name: str) -> None:
        self._ask(lambda: self._files.rm_file(self._path(name)))

    def names(self) -> list[str]:
        found: list[dict[str, Any]] = self._ask(lambda: self._files.ls(self._folder, detail=True))
        return [each["name"].rpartition("/")[2] for each in found if each["type"] == "file"]

    def close(self) -> None:
        """fsspec's file systems close their own connections."""
