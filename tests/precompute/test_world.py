import threading

import pytest

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.lifeline import Lifeline
from qwen_lora.precompute.nodes import resolve_by_turns
from qwen_lora.precompute.world import World


def run_ranks(size, work):
    """Run `work(world)` on `size` ranks, as threads around one in-process store."""
    from torch.distributed import HashStore

    store = HashStore()
    results: list = [None] * size

    def run(rank):
        lifeline = Lifeline.connect(rank, size, store, "127.0.0.1")
        try:
            with lifeline.guard():
                results[rank] = work(World(lifeline))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def test_one_process_talks_to_itself():
    world = World.from_environment()
    assert world.first and world.size == 1
    assert world.share([1]) == [1]
    assert world.gather({"a": 2}) == [{"a": 2}]
    world.check()


def test_values_reach_all_ranks_and_come_back():
    large = "x" * 3_000_000  # more than the store takes in one value

    def work(world):
        shared = world.share({"text": large} if world.first else None)
        return len(shared["text"]), world.gather(world.rank)

    assert run_ranks(3, work) == [(3_000_000, [0, 1, 2]), (3_000_000, []), (3_000_000, [])]


def test_one_process_of_each_machine_downloads():
    """Two machines of two: process 0, then the first of the other machine, then all others."""
    order: list = []

    def work(world):
        world.local_rank = world.rank % 2

        def resolve():
            order.append(world.rank)
            return world.rank

        resolve_by_turns(world, resolve)

    run_ranks(4, work)
    assert order[:2] == [0, 2] and sorted(order[2:]) == [1, 3]


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_stops_all_with_its_message(failing):
    def work(world):
        if world.rank == failing:
            raise InputError("the disk is full of cats")
        world.gather(None) if world.first else world.share()

    results = run_ranks(2, work)
    assert [type(result) for result in results] == [InputError, InputError]
    assert {str(result) for result in results} == {"the disk is full of cats"}


def test_a_bug_names_its_rank():
    def work(world):
        if world.rank == 1:
            raise KeyError("oops")
        world.gather(None)

    results = run_ranks(2, work)
    assert isinstance(results[0], QwenLoraError)
    assert "process 1: KeyError" in str(results[0])
