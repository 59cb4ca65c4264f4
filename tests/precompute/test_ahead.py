import threading
import time

import pytest

from qwen_lora.precompute.ahead import work_ahead


def test_results_come_in_order_and_memory_is_bounded():
    started, taken, worst = 0, 0, 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal started
        with lock:
            started += 1
        time.sleep(0.001 * (number % 3))
        return number * number

    for number, result in work_ahead(range(60), work, workers=4, ahead=6):
        assert (number, result) == (taken, taken * taken)
        taken += 1
        worst = max(worst, started - taken)
    assert taken == 60
    assert 1 <= worst <= 6


def test_an_error_surfaces_at_its_turn():
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    seen = []
    with pytest.raises(ValueError, match="three"):
        for number, _ in work_ahead(range(9), work, workers=2, ahead=4):
            seen.append(number)
    assert seen == [0, 1, 2]
