"""Stopping a run at a given step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qwen_lora.config.schema import Settings
from qwen_lora.errors import Stopped
from qwen_lora.train.run import train
from qwen_lora.train.step import Stepper


@contextmanager
def signal_after(steps: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Sends this process a signal while its `steps`-th step from here on is running."""
    original, done = Stepper.run, 0

    def run(self: Stepper, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", run)
        yield


def interrupt(settings: Settings, steps: int, number: int = signal.SIGTERM) -> None:
    with signal_after(steps, number), pytest.raises(Stopped) as stopped:
        train(settings)
    assert stopped.value.exit_code == 128 + number
