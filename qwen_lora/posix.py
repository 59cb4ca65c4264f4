"""Calls that only POSIX has, in one place: durable files, locks.

On other systems the functions that read still work; those that need a lock or fsync a folder
degrade to the nearest thing the platform has.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qwen_lora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OWN_FILE_MAX_BYTES = 4 << 30  # what is remembered of some ten million images
_UMASK = os.umask(0)  # it can only be read by setting it: once, before there are threads
os.umask(_UMASK)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power loss."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """`mkdir -p` whose names survive a power loss, so that the folder is there with its files."""
    if folder.is_dir():
        return
    missing = [folder]
    while not (parent := missing[-1].parent).exists() and parent != missing[-1]:
        missing.append(parent)
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        with suppress(PermissionError):  # a parent that we may write to, but not read
            fsync_folder(path.parent)


def new_folder_mode() -> int:
    """What mkdir would give a folder; mkdtemp's are private."""
    return 0o777 & ~_UMASK


def peak_rss_gib() -> float | None:
    """The most memory that this process has had at once, in GiB; None where nobody can say."""
    try:  # Linux's ru_maxrss counts what the parent had at the fork too
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        status = ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
        return int(found[1]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere


def free_memory() -> int | None:
    """Bytes of host memory that processes may still take; None where nobody says."""
    try:
        facts = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", facts, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def publish_file(temporary: Path, final: Path) -> None:
    """Give a finished, fsynced temporary its final name in one step and make the name durable.

    The temporary is gone afterwards, whatever happens: a full disk keeps no copy that nobody needs.
    """
    try:
        os.replace(temporary, final)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(final.parent)


@contextmanager
def temporary_file(folder: Path, prefix: str) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file in `folder` with a random name; fsynced on success, removed on any error.

    The caller publishes the path after the block. Opened O_EXCL and without following links.
    """
    descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
    path = Path(name)
    try:
        os.chmod(path, 0o666 & ~_UMASK)
        with os.fdopen(descriptor, "wb") as file:
            yield file, path
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_atomic(final: Path, data: bytes, temporary_folder: Path | None = None) -> None:
    """Write `data` under `final`'s name so that the file is whole or absent, whatever happens."""
    with temporary_file(temporary_folder or final.parent, f".{final.name}-") as (file, path):
        file.write(data)
    publish_file(path, final)


def try_lock(file: IO[bytes], *, shared: bool) -> bool:
    """Lock an open file if that can be had at once; held until it is closed. Where the platform has
    no such locks, nobody else can have one either."""
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
    return True


def open_own(path: Path, flags: int, most_bytes: int = OWN_FILE_MAX_BYTES) -> int:
    """A descriptor of a regular file that is this program's own. Raises OSError for a link, a pipe,
    and whatever else a stranger's folder may hold in its place."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | careful | getattr(os, "O_BINARY", 0), 0o666)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > most_bytes:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file of this program", str(path))
    return descriptor


def read_own(path: Path) -> bytes:
    """A whole file of this program's own, as `open_own`."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold `path` as a lock while the block runs.

    Raises InputError naming the holder's process id when another process has it.
    """
    make_folder(path.parent)
    try:
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL):
            raise
        raise InputError(f"{path} is a link or no file: remove it") from None
    file = os.fdopen(descriptor, "r+", encoding="ascii")
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                holder = file.read(32).strip() or "unknown"
                raise InputError(
                    f"{what} is in use by process {holder}; wait for it to end or stop it"
                ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        file.close()
