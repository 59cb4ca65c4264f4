"""A guard around code that handles hostile input: what it must never do is blocked and recorded.

    with guarded(allowed_folder) as guard:
        ...
    assert guard.violations == []

Python's audit events cover code (import, exec, compile, unpickling, ctypes), processes, the network
and every file that Python opens or changes. The hook stays for the life of the interpreter, since
none can be removed, and does nothing outside of `guarded`. Run once before what is guarded, so that
imports made on first use are over.
"""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BANNED = {
    *("exec", "compile", "import", "code.__new__", "function.__new__", "marshal.loads"),
    *("marshal.load", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec"),
    *("os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn"),
    *("urllib.Request", "http.client.connect", "webbrowser.open", "ftplib.connect"),
    *("setopencodehook", "sys.addaudithook", "sys.settrace", "sys.setprofile", "os.putenv"),
}
BANNED_FAMILIES = ("ctypes.", "socket.", "cpython.run_", "smtplib.", "telnetlib.", "winreg.")
CHANGES = {  # what changes a file, and how many paths stand first in its arguments
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.utime"), 1),
    **dict.fromkeys(("os.truncate", "os.chflags", "os.setxattr", "os.removexattr"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"), 2),
    **dict.fromkeys(("shutil.rmtree", "shutil.unpack_archive", "tempfile.mkstemp"), 1),
    **dict.fromkeys(("tempfile.mkdtemp", "os.mkfifo", "os.mknod"), 1),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Code and its data files, and what the system tells: reading these is no leak of user files.
LIBRARIES = tuple(
    os.path.realpath(path)
    for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "/proc", "/sys"}
    if path
) + (os.path.realpath(Path(__file__).parents[2] / "qwen_lora"), "/dev/null", "/dev/urandom")


class Violation(BaseException):
    """Raised inside the code that does what it must not, so that it does not happen."""


@dataclass
class Guard:
    """What was tried, and what it cost."""

    folders: tuple[str, ...]  # may be read and written
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    grown_bytes: int = 0  # of the process's largest resident size

    def refuse(self, text: str) -> None:
        self.violations.append(text)
        raise Violation(text)

    def check(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in BANNED or event.startswith(BANNED_FAMILIES):
            self.refuse(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITES) if isinstance(flags, int) else set("wax+") & set(mode)
            if isinstance(path, str | bytes | os.PathLike):
                allowed = self.folders if writes else self.folders + LIBRARIES
                self._inside(event, path, allowed)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._inside(event, path, self.folders)

    def _inside(self, event: str, path: Any, folders: tuple[str, ...]) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == folder or real.startswith(folder + os.sep) for folder in folders):
            self.refuse(f"{event} of {real}")


_active: list[Guard] = []
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _active:
        _active[-1].check(event, arguments)


@contextmanager
def guarded(*folders: Path) -> Iterator[Guard]:
    """Nothing but reading libraries, and reading and writing inside `folders`."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    guard = Guard(tuple(os.path.realpath(folder) for folder in folders))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    _active.append(guard)
    try:
        yield guard
    except Violation:
        pass  # stands in guard.violations
    finally:
        _active.pop()
        guard.seconds = time.perf_counter() - begin
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        guard.grown_bytes = (after - before) * (1 if sys.platform == "darwin" else 1024)
