"""The exceptions that reach a person, and the exit code each of them means.

    QwenLoraError          1  something failed; the message says what and what to do
    ├── InputError         2  the user's input is wrong (settings, dataset, model, shard set)
    ├── ShardError         1  a shard set is damaged or incomplete
    └── Stopped      130/143  a signal ended the run after its state was saved

The command line prints `error: <message>` in one line and exits. So it does for an OSError: the
file's name and the system's reason, exit code 1. Anything else keeps its traceback.
"""

from __future__ import annotations

import signal

from qwen_lora.redact import redact


class QwenLoraError(Exception):
    """A failure that has a one-line explanation, which holds no secret: texts are redacted."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(QwenLoraError):
    """The user's input is wrong: which value, and what to do."""

    exit_code = 2


class ShardError(QwenLoraError):
    """A shard set is damaged: which file, what was expected, what was found."""


class Stopped(QwenLoraError):
    """A signal stopped the run after saving; the exit code is 128 + the signal's number."""

    def __init__(self, signum: int, message: str = "") -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
