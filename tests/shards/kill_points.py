"""Kill a tool at every file that it opens for writing, renames or removes, then run it again.

    python kill_points.py merge|prune SCRATCH

Run as a process of its own, without torch: each attempt is a fork that kills itself with SIGKILL,
through an audit hook, right before the n-th change of the disk.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def killed_at(number: int, action: Callable[[], Any]) -> bool:
    """Whether `action` met its `number`-th change; False when it ended before."""
    child = os.fork()
    if child == 0:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
            if event in CHANGES or writes:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        except BaseException as error:
            print(f"change {number}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def samples(folder: Path) -> list[str]:
    """Live samples of a set of which every byte is right."""
    from qwen_lora.shards.reader import ShardSet
    from qwen_lora.shards.verify import verify

    assert (problems := verify(folder).problems) == [], problems
    with ShardSet.open(folder) as shards:
        return sorted(shards.table.sample_id)


def kill_merge(scratch: Path) -> int:
    """Into a new folder, and into a set that exists: the old set, or the whole new one."""
    from qwen_lora.shards.merge import merge

    a, b, c = (scratch / name for name in "abc")
    wanted = {}
    points = 0
    for kind in ("new", "append"):
        number = 0
        while True:
            shutil.rmtree(c, ignore_errors=True)
            sources = [a, b]
            if kind == "append":
                shutil.copytree(scratch / "old", c)
            if number == 0:
                merge(sources, c)
                wanted[kind] = files(c)
                before = samples(scratch / "old") if kind == "append" else None
                after = samples(c)
                shutil.rmtree(c)
                if kind == "append":
                    shutil.copytree(scratch / "old", c)
            killed = killed_at(number, partial(merge, sources, c))
            if (c / "manifest.json").exists():
                assert samples(c) in (before, after), number
            else:
                assert kind == "new"
            merge(sources, c)
            assert samples(c) == after
            assert files(c) == wanted[kind], (kind, number)
            assert not list((c / ".local").glob("*.tmp"))
            if not killed:
                break
            number += 1
            points += 1
    return points


def kill_prune(scratch: Path) -> int:
    """Compaction and removal: every kept generation is whole at any moment."""
    from qwen_lora.shards.prune import prune

    c = scratch / "c"
    points = 0
    for everything in (False, True):
        number = 0
        while True:
            shutil.rmtree(c, ignore_errors=True)
            shutil.copytree(scratch / "old", c)
            live = samples(c)
            if number == 0:
                prune(c, everything=everything)
                wanted = files(c)
                assert samples(c) == live
                shutil.rmtree(c)
                shutil.copytree(scratch / "old", c)
            killed = killed_at(number, partial(prune, c, everything=everything))
            assert samples(c) == live, number
            prune(c, everything=everything)
            assert samples(c) == live
            assert files(c) == wanted, (everything, number)
            assert not list((c / ".local").glob("*.tmp"))
            if not killed:
                break
            number += 1
            points += 1
    return points


if __name__ == "__main__":
    print({"merge": kill_merge, "prune": kill_prune}[sys.argv[1]](Path(sys.argv[2])))
