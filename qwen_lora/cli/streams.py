"""Printing where stdout or stderr may be closed, full, or unable to show a character."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import typer

from qwen_lora.errors import QwenLoraError


class PrintError(QwenLoraError):
    """stdout took no more."""


class ReaderLeft(PrintError):
    """Whoever read from stdout has ended."""


def steady_streams() -> None:
    """Give what is closed of stdin, stdout and stderr an end: else the next file that is opened, a
    shard for one, gets its number, and with it what a library prints. Characters that stdout's
    encoding lacks are printed as escapes, and its errors are told from those of other files."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout = cast(TextIO, _Stdout(sys.stdout))


class _Stdout:
    """stdout with a PrintError in the place of an OSError."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What still waits would be tried again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            kind = ReaderLeft if error.errno == errno.EPIPE else PrintError
            raise kind(f"cannot write to stdout: {error.strerror}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_json(value: Any, indent: int | None = None) -> None:
    """As UTF-8, or in ASCII where stdout has another encoding: JSON either way."""
    utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    print(json.dumps(value, indent=indent, ensure_ascii=not utf8))


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """For what only prints: `| head` that has read enough is no failure."""
    try:
        yield
        sys.stdout.flush()
    except ReaderLeft:
        raise typer.Exit(0) from None
