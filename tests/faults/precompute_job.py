"""The whole command `qwen-lora precompute`, as a job of the fork server."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qwen_lora.cli import main
from qwen_lora.precompute import write


class CommandFailed(Exception):
    """Exit code and everything that the command printed."""


class _AtOnce:
    """Stands for the writing thread: with one thread the calls come in the same order each time."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True) -> None: ...


def precompute_set(folder: Path, one_thread: bool = True) -> None:
    """Six images in three shards, with preview prompts. Model and images are named by the
    environment, since they are the same for all."""
    if one_thread:
        write.ThreadPoolExecutor = _AtOnce  # type: ignore[misc, assignment]
    run_command(_words(str(folder), os.environ["FAULT_IMAGES"]))


def precompute_remote(
    folder: Path, url: str, images: str, parts: bool = False, rank: int | None = None, port: int = 0
) -> None:
    """The same to a URL, with `folder` for the state; `parts`: every shard goes up in parts. With a
    rank, as one of two processes that meet at a port."""
    from qwen_lora.shards.remote import objects
    from qwen_lora.shards.remote.retries import Patience

    opened = objects.open_object_remote
    haste = Patience(attempts=5, first_wait_s=0.001, longest_wait_s=0.01, stall_s=5.0)
    objects.open_object_remote = lambda place: opened(place, haste)  # type: ignore[misc, assignment]
    if parts:
        objects.ONE_PUT_BYTES = 1000
    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    print(run_command([*_words(url, images), "--state-dir", str(folder)]), flush=True)


def _words(output: str, images: str) -> list[str]:
    words = ["precompute", images, "--output", output]
    words += ["--model", os.environ["FAULT_MODEL"], "--resolution", "96"]
    changes = {"shard_max_samples": 2, "vae_batch_size": 2, "encode_threads": 1}
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return [*words, "--set", 'preview_prompts=["a red fox, sitting"]']


def run_command(words: list[str]) -> str:
    """What it said. Raises CommandFailed unless the command ends with 0."""
    said = io.StringIO()
    sys.argv = ["qwen-lora", *words]
    code: Any = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code
    if code:
        raise CommandFailed(f"{code}\n{said.getvalue()}")
    return said.getvalue()
