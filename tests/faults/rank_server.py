"""A process that has imported everything and forks the ranks of one run after another.

Reads a JSON object a line: {"ranks": [{"argv", "environment", "fault", "log", ...}], "deadline"}.
Answers with one line: for every rank its exit code (-9: killed; null: it had to be killed at the
deadline, it hung) and when it ended (time.monotonic, one clock for all processes).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any


def run_rank(order: dict[str, Any]) -> None:
    """The child's whole life. It ends as a command does, its threads awaited, but leaves out the
    clearing of all modules, which takes seconds after a fork."""
    os.environ.update(order["environment"])
    if "folder" in order:
        os.chdir(order["folder"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    from huggingface_hub import constants as hub
    from rank_faults import arm

    from qwen_lora import lifeline, lifeline_hub
    from qwen_lora.families.qwen_image import scaled
    from qwen_lora.precompute import nodes

    for name, value in order["constants"].items():
        for module in (lifeline, lifeline_hub, nodes, scaled):
            setattr(module, name, value)
    if "HF_HOME" in order["environment"]:  # it was read when this was imported
        hub.HF_HUB_CACHE = os.path.join(order["environment"]["HF_HOME"], "hub")
    arm(**order["fault"])
    from qwen_lora.cli import main

    sys.argv = ["qwen-lora", *order["argv"]]
    code: Any = 1
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_all(orders: list[dict[str, Any]], deadline: float) -> list[tuple[int | None, float]]:
    pids = {}
    for number, order in enumerate(orders):
        pid = os.fork()
        if pid == 0:
            run_rank(order)
        pids[pid] = number
    ends: list[tuple[int | None, float]] = [(None, 0.0)] * len(orders)
    until = time.monotonic() + deadline
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pids.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic()
        if time.monotonic() > until:
            break
        time.sleep(0.005)
    for pid, number in pids.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ends[number] = None, time.monotonic()
    return ends


def main() -> None:
    logging.disable(logging.WARNING)  # what PEFT's import makes bitsandbytes say

    import qwen_lora.precompute.encode
    import qwen_lora.precompute.lead
    import qwen_lora.precompute.run
    import qwen_lora.train.export
    import qwen_lora.train.plot
    import qwen_lora.train.previews
    import qwen_lora.train.report
    import qwen_lora.train.run
    import qwen_lora.train.sources  # noqa: F401

    logging.disable(logging.NOTSET)
    gc.freeze()  # or the first collection in each child copies all of this
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(run_all(order["ranks"], order["deadline"])), flush=True)


if __name__ == "__main__":
    main()
