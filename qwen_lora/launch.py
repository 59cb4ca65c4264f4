"""`--num-processes N`: start N copies of the command and own them until they have saved.

Each child is one rank; accelerate reads its place from the environment. The children live in their
own sessions, so that Ctrl-C in a terminal reaches them once, through here, and the kernel sends
them SIGTERM if this process dies: no orphan keeps a GPU. Needs no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

PROGRAM = (sys.executable, "-m", "qwen_lora")
# After a child's failure the others have this long to end by themselves (the lifeline has them do
# so within its GRACE_S), then to end on SIGTERM.
ALONE_S, GRACE_S = 7.0, 12.0
POLL_S = 0.1
# Runs before the child's program: have the kernel send SIGTERM when the launcher dies, however it
# dies (1 is PR_SET_PDEATHSIG; it survives exec), and look whether that has happened already. A
# program of its own, because code between fork and exec is unsafe in a process with threads.
_TIED = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit(143)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


def launch_processes(
    argv: Sequence[str], num_processes: int, *, program: Sequence[str] = PROGRAM
) -> int:
    """Run `program argv` as `num_processes` ranks; the exit code of the whole.

    SIGTERM and SIGINT are forwarded and the children are waited for while they save: 143 or 130.
    When one child fails, the others get SIGTERM after seven seconds and SIGKILL after twelve.
    """
    family = _Children([*program, *argv], num_processes)
    previous = {
        number: signal.signal(number, family.forward) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        family.start()
        return family.wait()
    finally:
        family.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Children:
    def __init__(self, command: list[str], count: int) -> None:
        if sys.platform == "linux":
            command = [sys.executable, "-c", _TIED, str(os.getpid()), *command]
        self._command, self._count = command, count
        self._processes: list[subprocess.Popen[str]] = []
        self._relays: list[threading.Thread] = []
        self._held: list[str] = []  # error lines of ranks other than 0
        self._signum = 0

    def start(self) -> None:
        port = _free_port()
        for rank in range(self._count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._count),
                "LOCAL_WORLD_SIZE": str(self._count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._processes.append(process)
            if self._signum:  # it came while starting
                process.send_signal(self._signum)
        for process in self._processes[1:]:
            assert process.stderr is not None
            relay = threading.Thread(target=self._relay, args=(process.stderr,), daemon=True)
            relay.start()
            self._relays.append(relay)

    def forward(self, signum: int, frame: FrameType | None) -> None:
        self._signum = self._signum or signum
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signum)

    def wait(self) -> int:
        """Wait for all; end the others soon after one failed."""
        failed_at = 0.0
        first_failure = 0
        told = False
        while None in [process.poll() for process in self._processes]:
            if not first_failure:
                first_failure = next((code for code in self._codes() if code), 0)
                failed_at = time.monotonic()
            elif not self._signum:  # with a signal the others are saving: wait for them
                since = time.monotonic() - failed_at
                if since > GRACE_S:
                    self._send(signal.SIGKILL)
                elif since > ALONE_S and not told:
                    self._send(signal.SIGTERM)
                    told = True
            time.sleep(POLL_S)
        for relay in self._relays:
            relay.join(timeout=1)
        return self._exit_code(first_failure)

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _exit_code(self, first_failure: int) -> int:
        codes = self._codes()
        if not any(codes):
            return 0
        if self._signum and all(code in (0, 128 + self._signum, -self._signum) for code in codes):
            return 128 + self._signum
        # All ranks end with the same error; rank 0 has said it, unless it was killed or never came.
        if codes[0] not in (1, 2):
            for line in dict.fromkeys(self._held):
                sys.stderr.write(line)
            sys.stderr.flush()
        code = first_failure or next(code for code in codes if code)
        return code if code > 0 else 128 - code

    def _codes(self) -> list[int]:
        return [process.returncode or 0 for process in self._processes]

    def _send(self, signum: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signum)

    def _relay(self, stream: IO[str]) -> None:
        """Pass on what another rank prints. Its `error:` line waits: rank 0 mostly has the same."""
        with stream:
            for line in stream:
                if line.startswith("error: "):
                    self._held.append(line)
                else:
                    sys.stderr.write(line)
                    sys.stderr.flush()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
