"""A process that has imported everything and forks once for each fault: a kill costs milliseconds.

Reads one JSON object a line, answers with one line. `{"start": job, "folder": ..., "point": ...}`
forks a child that stops itself before it runs the job (so that a tracer can attach) and tells its
pid; `{"wait": pid}` waits for its end. Jobs are the functions of `fault_jobs`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

FAILED = 1  # exit status of a job that raised; what it raised stands in its answer file


def run_job(jobs: Any, order: dict[str, Any], answer: socket.socket) -> None:
    """The child's whole life. What it raised goes through a socket, which no fault touches."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        if order["point"] is not None:
            from in_process import arm

            arm(**order["point"])
        code = getattr(jobs, order["start"])(Path(order["folder"]), **order["arguments"]) or 0
    except BaseException as error:
        facts = {"kind": type(error).__name__, "message": str(error)}
        answer.send(json.dumps(facts).encode())
        answer.send(b"\n" + traceback.format_exc()[-10_000:].encode())
        code = FAILED
    os._exit(code)


def main(warm_up: list[str]) -> None:
    import fault_jobs

    for name in warm_up:
        getattr(fault_jobs, name)()
    print("ready", flush=True)
    ends: dict[int, socket.socket] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            with ends.pop(order["wait"]) as end:
                said = end.makefile("rb").read().decode()
            print(json.dumps([os.waitstatus_to_exitcode(status), said]), flush=True)
            continue
        end, answer = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            run_job(fault_jobs, order, answer)
        answer.close()
        ends[pid] = end
        if order["stopped"]:
            os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
