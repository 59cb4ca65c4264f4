"""A protocol whose far side is a folder, with a script of what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.remote.base import ChangedRemotely, Remote, RemoteError, never_stop

Fault = Callable[[bytes], bytes]  # what arrives in place of the rest of a file


class FolderRemote(Remote):
    """Objects are the folder's files. `faults[name]` is used up from the front, one a fetch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, "test://set"
        self.faults: dict[str, list[Fault]] = {}
        self.fetched: list[tuple[str, int]] = []  # name, bytes asked for
        self.may_go = threading.Event()  # cleared: transfers stall
        self.may_go.set()

    def read(
        self, name: str, most_bytes: int, check: Callable[[], None] = never_stop
    ) -> tuple[bytes, str | None]:
        data = (self.folder / name).read_bytes()
        if len(data) > most_bytes:
            raise RemoteError(f"{self.where(name)} is too long")
        return data, sha256_hex(data)

    def fetch(
        self, name: str, size: int, file: BinaryIO, check: Callable[[], None] = never_stop
    ) -> None:
        start = file.tell()
        self.fetched.append((name, size - start))
        while not self.may_go.wait(0.01):
            check()
        data = (self.folder / name).read_bytes()
        if len(data) != size:
            raise ChangedRemotely(f"{self.where(name)} has another length")
        rest = data[start:]
        if self.faults.get(name):
            rest = self.faults[name].pop(0)(rest)
        file.write(rest)
        file.flush()
        check()
        if start + len(rest) != size:
            raise RemoteError(f"{self.where(name)}: the connection was lost")

    def names(self) -> list[str] | None:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def put(
        self,
        name: str,
        source: Path | bytes,
        check: Callable[[], None] = never_stop,
        resumed: bool = False,
    ) -> None:
        data = source if isinstance(source, bytes) else source.read_bytes()
        (self.folder / name).write_bytes(data)

    def replace(self, name: str, data: bytes, version: str | None) -> str | None:
        path = self.folder / name
        present = sha256_hex(path.read_bytes()) if path.exists() else None
        if present != version:
            raise ChangedRemotely(f"{self.where(name)} was written by somebody else")
        path.write_bytes(data)
        return sha256_hex(data)

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held."""
