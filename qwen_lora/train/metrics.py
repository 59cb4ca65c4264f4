"""RUN/metrics.jsonl: one JSON object a line, by step. A resumed run continues it without repeats.

Training lines: step, epoch, loss (mean over the interval), smoothed_loss, learning_rate, grad_norm,
step_seconds, samples_per_s, data_wait_seconds (of a step, for its records), samples, peak_rss_gib
(of rank 0) and on a GPU peak_memory_gib. Measurement lines: step, epoch and validation_loss
(held-out images) or fixed_train_loss (training images), with the same by sigma.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from qwen_lora.errors import QwenLoraError
from qwen_lora.posix import write_atomic

FILE = "metrics.jsonl"


class MetricsFile:
    """Appends whole lines. `write` is a no-op where `path` is None (ranks other than 0)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def continue_from(self, step: int) -> None:
        """Drop the lines of steps after `step`, which are going to be trained again, and a torn
        last line."""
        if self.path is None or not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_atomic(self.path, b"".join(_line(row) for row in kept))

    def clear(self) -> None:
        """Start anew: an earlier start saved no checkpoint, so its lines are of no use."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def last_step_of(self, key: str) -> int:
        """The last step with a line that has `key`; -1 if there is none."""
        if self.path is None or not self.path.exists():
            return -1
        return max((row["step"] for row in read_metrics(self.path) if key in row), default=-1)

    def write(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = _line(row)
        try:
            # One write to a file opened for appending: a reader never sees half a line of ours.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise QwenLoraError(
                f"cannot write {self.path}: {error}; the checkpoints are intact, free some space "
                "and run the same command again"
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line torn by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()
