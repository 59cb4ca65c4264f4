"""Faults without a tracer: the functions that change files count themselves, and the chosen call
kills its process or fails. Coarser than strace (Python's calls, not the system's), works anywhere.
"""

from __future__ import annotations

import builtins
import errno as errors
import io
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "link", "chmod", "remove")
_plain_write = os.write


class _Counter:
    """Acts at call `number` (from 1), never for 0; names the calls in the file `log`."""

    def __init__(self, number: int, error: str | None, log: int | None) -> None:
        self.number, self.error, self.log, self.count = number, error, log, 0

    def hit(self, what: str) -> None:
        self.count += 1
        if self.log is not None:
            _plain_write(self.log, f"{what}\n".encode())
        if self.count != self.number:
            return
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errors, self.error or "")
        raise OSError(code, os.strerror(code))


class _CountedFile(io.FileIO):
    counter: _Counter

    def write(self, data: Any) -> int:
        self.counter.hit("write")
        return super().write(data)


def arm(number: int, error: str | None = None, log: str | None = None) -> None:
    """From here on this process counts what it changes, in any folder."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    counter = _Counter(number, error, os.open(log, flags, 0o600) if log else None)
    plain_open, plain_fdopen, plain_os_open = builtins.open, os.fdopen, os.open
    kind = type("CountedFile", (_CountedFile,), {"counter": counter})

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "b" not in mode or not set(mode) & set("wxa+"):
            return plain_open(file, mode, *rest, **more)
        if not isinstance(file, int):
            counter.hit("open")
        raw = kind(file, mode.replace("b", ""))
        if rest[:1] == (0,) or more.get("buffering") == 0:
            return raw
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    def fd_opened(file: int, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return (opened if "b" in mode else plain_fdopen)(file, mode, *rest, **more)

    def os_opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            counter.hit("open")
        return plain_os_open(path, flags, *rest, **more)

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            counter.hit(name)
            return plain(*arguments, **more)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    builtins.open = io.open = opened  # pathlib takes io's
    os.open, os.fdopen = os_opened, fd_opened  # type: ignore[assignment]
