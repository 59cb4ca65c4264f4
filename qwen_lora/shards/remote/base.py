"""What a protocol (http, hf, s3, ...) has to do for a shard set; everything else is shared.

A protocol moves bytes and knows nothing of manifests or hashes: `qwen_lora.shards.remote.store`
checks the sha256 of all that arrives, keeps it in the cache, and asks again when it is wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qwen_lora.errors import InputError, QwenLoraError


class RemoteError(QwenLoraError):
    """A transfer that failed for good: what was asked for, what came, what to do."""


class ChangedRemotely(QwenLoraError):
    """An object is not the one whose first bytes were fetched, or a conditional write was late."""


def never_stop() -> None:
    """The `check` of a caller that never wants to stop."""


class Remote(ABC):
    """The objects of one set, by bare name, under one URL. Safe to use from several threads.

    Transient failures (a dropped or stalled connection, 429, 500, 502, 503, 504, a short body) are
    retried inside, with backoff; what is left over is raised. `check` is called often during a
    transfer; what it raises ends the transfer.
    """

    label: str  # the URL as people may see it: without credentials, query or fragment

    def where(self, name: str) -> str:
        return f"{self.label}/{name}"

    @abstractmethod
    def read(
        self, name: str, most_bytes: int, check: Callable[[], None] = never_stop
    ) -> tuple[bytes, str | None]:
        """A whole small object and its version (an ETag, or None where there is none).

        Raises FileNotFoundError when there is none, RemoteError for more than `most_bytes`, for a
        page of HTML in its place, for missing permission, or when retries are used up.
        """

    @abstractmethod
    def fetch(
        self, name: str, size: int, file: BinaryIO, check: Callable[[], None] = never_stop
    ) -> None:
        """Write the bytes from `file.tell()` to `size` of object `name` at the end of `file`.

        `file` stands at its end and is flushed often, so that a later call goes on where this one
        broke off. On return it has exactly `size` bytes; its content is for the caller to verify.
        Raises FileNotFoundError, RemoteError, and ChangedRemotely when what is there now cannot be
        the object that the first bytes came from (length, ETag): the caller then starts over.
        """

    def names(self) -> list[str] | None:
        """Bare names of the objects directly under the URL; None where a listing cannot be had."""
        return None

    # ---- writing: object stores only -------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises InputError where this protocol cannot put and delete objects."""
        if type(self).delete is Remote.delete:
            raise self._read_only()

    def check_permission(self) -> None:  # noqa: B027 - most can only be tried
        """Raises InputError or RemoteError where this user may not put objects, and leaves none."""

    def put(
        self,
        name: str,
        source: Path | bytes,
        check: Callable[[], None] = never_stop,
        resumed: bool = False,
    ) -> None:
        """Upload under a content name, whole or not at all. `resumed`: a file is not sent again if
        there is an object of its name and length. Raises InputError where this protocol cannot
        write, RemoteError."""
        raise self._read_only()

    def replace(self, name: str, data: bytes, version: str | None) -> str | None:
        """Write a small object if it still has `version` (None: if there is none); returns the new
        version. Raises ChangedRemotely when somebody else was first."""
        raise self._read_only()

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        raise self._read_only()

    @abstractmethod
    def close(self) -> None:
        """Let go of connections."""

    def _read_only(self) -> InputError:
        return InputError(f"{self.label} can only be read; write to a folder or an s3:// URL")
