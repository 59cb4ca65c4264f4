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
    words = ["precompute", os.environ["FAULT_IMAGES"], "--output", str(folder)]
    words += ["--model", os.environ["FAULT_MODEL"], "--resolution", "96"]
    changes = {"shard_max_samples": 2, "vae_batch_size": 2, "encode_threads": 1}
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    run_command([*words, "--set", 'preview_prompts=["a red fox, sitting"]'])


def run_command(words: list[str]) -> None:
    """Raises CommandFailed unless the command ends with 0."""
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
