"""How often a failed request is made again, and how long is waited before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from qwen_lora.shards.remote.base import RemoteError

PROGRESS_BYTES = 64 << 10  # with so many new bytes a transfer has got on, and is patient again
_SLICE_S = 0.2  # `check` is called so often while waiting


class Transient(Exception):
    """One attempt failed in a way that may pass: a dropped connection, 503, a short body."""


@dataclass(frozen=True)
class Patience:
    """Attempts in a row without progress, and seconds before the second; the wait doubles. A
    connection on which nothing comes for `stall_s` is given up."""

    attempts: int = 7
    first_wait_s: float = 0.5
    longest_wait_s: float = 15.0
    stall_s: float = 30.0


class Retries:
    """The failures of one transfer."""

    def __init__(self, what: str, patience: Patience, check: Callable[[], None]) -> None:
        self._what, self._patience, self._check = what, patience, check
        self._failures = 0
        self._arrived = 0

    @property
    def failures(self) -> int:
        return self._failures

    def arrived(self, count: int) -> None:
        """`count` new bytes."""
        self._arrived += count
        if self._arrived >= PROGRESS_BYTES:
            self._failures = self._arrived = 0

    def failed(self, reason: Exception) -> None:
        """Wait before the next attempt. Raises RemoteError when there have been enough."""
        self._failures += 1
        if self._failures >= self._patience.attempts:
            raise RemoteError(
                f"{self._what}: {reason}; given up after {self._failures} attempts, the same "
                "command continues once the store answers"
            ) from reason
        wait = self._patience.first_wait_s * 2 ** (self._failures - 1)
        wait = min(wait, self._patience.longest_wait_s) * random.uniform(0.75, 1.25)
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, _SLICE_S))
        self._check()
