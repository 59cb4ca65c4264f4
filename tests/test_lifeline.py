"""The hub and the lines to it, with threads in place of processes."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from qwen_lora import lifeline_hub
from qwen_lora.errors import InputError, QwenLoraError, Stopped
from qwen_lora.lifeline import Lifeline, error_facts, error_from, join_processes

Work = Callable[[Lifeline], None]


def run_ranks(*works: Work) -> list[Exception | None]:
    """Run each of `works` as one rank; what they raised."""
    from torch.distributed import HashStore

    store = HashStore()
    raised: list[Exception | None] = [None] * len(works)

    def run(rank: int) -> None:
        line = Lifeline.connect(rank, len(works), store, "127.0.0.1")
        try:
            with line.guard():
                works[rank](line)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return raised


def fail(error: Exception, after: float = 0.0) -> Work:
    def work(_: Lifeline) -> None:
        time.sleep(after)
        raise error

    return work


def wait(line: Lifeline) -> None:
    """As in a collective: broken off when another rank has failed, with an error of no meaning."""
    while line._first is None:
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")


def die(line: Lifeline) -> None:
    """As the kernel does with the sockets of a killed process."""
    assert line._line is not None
    line._line.shutdown(socket.SHUT_RDWR)


def texts(raised: list[Exception | None]) -> set[str]:
    return {str(error) for error in raised}


def test_ranks_that_all_come_to_their_end_leave_in_peace() -> None:
    assert run_ranks(lambda _: None, lambda _: time.sleep(0.2), lambda _: None) == [None] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [InputError("no cats"), QwenLoraError("cats"), KeyError("cat")])
def test_all_raise_the_error_of_one(
    failing: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifeline_hub, "CAUSE_S", 0.2)
    works: list[Work] = [wait] * 3
    works[failing] = fail(error)
    raised = run_ranks(*works)
    expected = f"process {failing}: KeyError: 'cat'" if type(error) is KeyError else str(error)
    assert texts(raised) == {expected}
    kind = InputError if type(error) is InputError else QwenLoraError
    assert {type(each) for each in raised} == {kind}


def test_an_error_that_says_the_cause_goes_before_one_that_may_follow_from_it() -> None:
    raised = run_ranks(
        wait, fail(RuntimeError("Connection closed by peer")), fail(QwenLoraError("cause"), 0.3)
    )
    assert texts(raised) == {"cause"}


def test_a_rank_that_ends_without_a_word_is_noticed() -> None:
    raised = run_ranks(wait, fail(RuntimeError("Connection closed by peer")), die)
    assert "process 2 ended without a word" in str(raised[0])
    assert str(raised[0]) == str(raised[1])


def test_those_that_are_done_hear_of_a_later_failure() -> None:
    raised = run_ranks(lambda _: None, fail(QwenLoraError("late"), 0.3))
    assert texts(raised) == {"late"}


def test_a_stop_travels_with_its_signal() -> None:
    stopped = error_from(json.loads(json.dumps(error_facts(Stopped(15, "stopped"), 1))))
    assert isinstance(stopped, Stopped) and (stopped.signum, stopped.exit_code) == (15, 143)


def test_what_is_said_is_one_line_with_its_notes_and_no_secret() -> None:
    error = RuntimeError("CUDA error: misaligned address\nCompile with TORCH_USE_CUDA_DSA")
    error.add_note("in step 3, samples a, b")
    facts = error_facts(error, 2)
    assert facts["message"] == (
        "process 2: RuntimeError: CUDA error: misaligned address (in step 3, samples a, b)"
    )
    secret = error_from(error_facts(OSError("https://me:hunter2@host/x"), 0))
    assert "hunter2" not in str(secret)


def test_a_stranger_at_the_port_is_sent_away() -> None:
    """Neither wrong tokens nor garbage count as a process."""
    from torch.distributed import HashStore

    store = HashStore()
    ends: list[Lifeline] = []
    first = threading.Thread(target=lambda: ends.append(Lifeline.connect(0, 2, store, "127.0.0.1")))
    first.start()
    port, _ = json.loads(store.get("lifeline"))
    for said in (b'{"rank": 1, "token": "guess"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            with suppress(OSError):  # it may be closed with what it said unread
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
    ends.append(Lifeline.connect(1, 2, store, "127.0.0.1"))
    first.join(timeout=20)
    threads = [threading.Thread(target=_in_peace, args=(line,)) for line in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def bound_to(host: str) -> str:
    with lifeline_hub.listen_on(host, 1) as server:
        return str(server.getsockname()[0])


def test_the_hub_listens_where_the_others_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one address if the name means one here; at all of them if it does not."""
    assert bound_to("127.0.0.1") == "127.0.0.1"
    assert bound_to("localhost") in ("127.0.0.1", "::1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells this machine's own address
            own = probe.getsockname()[0]
            assert own.startswith("127.") or bound_to(own) == own
    everywhere = ("::", "0.0.0.0")
    assert bound_to("192.0.2.7") in everywhere  # of a service in front of this machine
    assert bound_to("no-such-name.invalid") in everywhere

    def as_debian(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", as_debian)
    assert bound_to("head-node") in everywhere


def _in_peace(line: Lifeline) -> None:
    with line.guard():
        pass


def test_a_process_alone_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    line = join_processes()
    with pytest.raises(KeyError), line.guard(), line.telling():
        raise KeyError
    line.check()
    assert line.size == 1
