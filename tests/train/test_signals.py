"""A stop signal is remembered, not obeyed at once; the second SIGINT is."""

import os
import signal

import pytest

from qwen_lora.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), number)
        assert stop.signum == number
    assert signal.getsignal(number) == before


def test_the_second_interrupt_is_immediate() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_termination_keeps_waiting() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
