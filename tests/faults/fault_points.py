"""Every call of a job that changes files, and a way to break the job off there.

strace attaches to a stopped child, counts the calls of a first whole run, and in later runs kills
the child at one of them before it takes effect, or makes it fail. Where strace is missing or may
not trace, `in_process` does both inside the child.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Those that a machine does not have (`open` on arm64) are left out by strace: "?".
CALLS = (
    *("open", "openat", "creat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename"),
    *("renameat", "renameat2", "unlink", "unlinkat", "rmdir", "link", "linkat", "symlink"),
    *("mkdir", "mkdirat", "ftruncate", "chmod", "fchmod", "fchmodat", "sendfile"),
)
_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)")
ATTACH_S, END_S = 20.0, 120.0


@dataclass(frozen=True)
class Point:
    """The `number`-th call of a kind in a job, from 1; the fallback counts all kinds together."""

    call: str
    number: int
    line: str = ""  # as strace shows it

    @property
    def changes(self) -> bool:
        """Not so the mkdir of a folder that is there."""
        return " = -1 E" not in self.line and self.line != "mkdir"

    def __str__(self) -> str:
        return f"{self.call} #{self.number} {self.line[:160]}"


@dataclass(frozen=True)
class End:
    """How a job ended: exit code (-9: killed), and the error that it raised."""

    code: int
    kind: str
    message: str
    log: str


class ForkServer:
    """The process that jobs are forked from."""

    def __init__(
        self, scratch: Path, warm_up: tuple[str, ...] = ("warm_up",), **environment: str
    ) -> None:
        self.scratch, self._log = scratch, scratch / "output.log"
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), *warm_up],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",  # it warns in forks
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"
        self.traces = can_trace(self)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()

    def start(
        self, job: str, folder: Path, *, stopped: bool = False, point: Any = None, **arguments: Any
    ) -> int:
        """Fork a child for a job; its pid."""
        order = {"start": job, "folder": str(folder), "stopped": stopped, "log": str(self._log)}
        return int(self._ask({**order, "point": point, "arguments": arguments}))

    def wait(self, pid: int) -> End:
        code, said = json.loads(self._ask({"wait": pid}))
        facts, _, trace = said.partition("\n")
        log = self._log.read_text(errors="replace") + trace
        return End(code, *(json.loads(facts).values() if facts else ("", "")), log)

    def run(self, job: str, folder: Path, **arguments: Any) -> None:
        """Run a job undisturbed; it must succeed."""
        end = self.wait(self.start(job, folder, **arguments))
        assert end.code == 0, end.log

    def _ask(self, order: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the fork server has ended; see its stderr"
        return line


def points_of(
    server: ForkServer, job: str, folder: Path, *, within: Path | None = None, **arguments: Any
) -> list[Point]:
    """Run a job to its end and name every call of it that changed something in `folder`, or in all
    of `within`."""
    prefix = str(within or folder)
    log = server.scratch / "calls.log"
    if not server.traces:
        server.run(job, folder, point={"number": 0, "log": str(log)}, **arguments)
        lines = log.read_text().splitlines()
        return [Point("any", number, line) for number, line in enumerate(lines, 1)]
    end = _traced(server, job, folder, log, (), arguments)
    assert end.code == 0, end.log
    counts: Counter[str] = Counter()
    points = []
    for line in log.read_text(errors="replace").splitlines():
        match = _CALL.match(line)
        if match is None or match[1] not in CALLS:
            continue
        counts[match[1]] += 1
        reads = match[1] in ("open", "openat") and "O_CREAT" not in line
        if prefix in line and not reads:
            points.append(Point(match[1], counts[match[1]], match[2].replace(prefix, "")))
    return points


def kill_at(server: ForkServer, point: Point, job: str, folder: Path, **arguments: Any) -> End:
    """Run a job that gets SIGKILL instead of the call; -9 is its exit code if it came so far."""
    if not server.traces:
        pid = server.start(job, folder, point={"number": point.number}, **arguments)
        return server.wait(pid)
    inject = f"inject={point.call}:signal=SIGKILL:when={point.number}"
    return _traced(server, job, folder, server.scratch / "killed.log", (inject,), arguments)


def fail_at(
    server: ForkServer, point: Point, error: str, lasting: bool, job: str, folder: Path, **more: Any
) -> End:
    """Run a job one of whose calls fails; `lasting`: and all of its kind from there on."""
    if not server.traces:
        failing = {"number": point.number, "error": error}
        return server.wait(server.start(job, folder, point=failing, **more))
    when = f"{point.number}{'+' if lasting else ''}"
    inject = f"inject={point.call}:error={error}:when={when}"
    return _traced(server, job, folder, server.scratch / "failed.log", (inject,), more)


def _traced(
    server: ForkServer,
    job: str,
    folder: Path,
    log: Path,
    extra: tuple[str, ...],
    arguments: dict[str, Any],
) -> End:
    log.unlink(missing_ok=True)
    pid = server.start(job, folder, stopped=True, **arguments)
    names = ",".join(f"?{name}" for name in CALLS)
    command = ["strace", "-qq", "-y", "-s", "400", "-o", str(log), "-p", str(pid)]
    command += ["-e", f"trace={names}", *(word for item in extra for word in ("-e", item))]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        # Its first line says that the child is stopped: from now on it counts every call.
        deadline = time.monotonic() + ATTACH_S
        while not (log.exists() and log.stat().st_size):
            if tracer.poll() is not None or time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                server.wait(pid)
                raise RuntimeError(f"strace did not attach: {tracer.communicate()[1]}")
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        end = server.wait(pid)
        tracer.wait(timeout=END_S)
    finally:
        tracer.kill()
        tracer.communicate()
    return end


def can_trace(server: ForkServer) -> bool:
    """Whether strace is here and allowed to trace our children."""
    if shutil.which("strace") is None:
        return False
    try:
        log = server.scratch / "trial.log"
        return _traced(server, "nothing", server.scratch / "none", log, (), {}).code == 0
    except RuntimeError:
        return False


def visible_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its subfolders by relative name, hidden ones left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path.read_bytes()
    return found
