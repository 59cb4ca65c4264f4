"""One failing process ends all of a run with the same first error, also when it is killed.

Every process keeps a socket to a hub in process 0. A process that fails says why before it leaves;
of one that is killed the kernel closes the socket. The hub passes on to all what it heard first.
Whoever then gets "connection closed" out of a collective raises that first error instead; whoever
does not come back (from a collective on a GPU, a long read) is ended by its listening thread. While
all goes well nothing is sent and nothing is polled. Needs torch only to let the processes find each
other.

Tried with gloo. That a process which waits in an NCCL kernel is ended follows from `os._exit`,
which asks no other thread; it has not been tried on several GPUs.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

from qwen_lora.errors import InputError, QwenLoraError, Stopped
from qwen_lora.lifeline_hub import (
    CAUSE_S,
    LINK_S,
    Facts,
    Hub,
    accept,
    keep_alive,
    killed,
    listen_on,
    receive,
    send,
)

JOIN_S = 600.0  # for the last process to start
GRACE_S = 5.0  # to end by itself for a process that has heard of an error
MOST_CHARACTERS = 8000  # of an error
_KEY = "lifeline"
_joins = count()  # a launcher's store outlives a run: each has keys of its own


def error_facts(error: BaseException, rank: int) -> Facts:
    """An error in one line, to be said by every process."""
    if isinstance(error, Stopped):
        return {"kind": "stopped", "message": str(error), "signum": int(error.signum)}
    if isinstance(error, QwenLoraError):
        kind = "input" if isinstance(error, InputError) else "error"
        return {"kind": kind, "message": str(error)[:MOST_CHARACTERS]}
    if isinstance(error, KeyboardInterrupt):
        return {"kind": "error", "message": f"process {rank} was interrupted"}
    first_line = str(error).strip().partition("\n")[0]
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    message = f"process {rank}: {type(error).__name__}: {first_line}{notes}"
    return {"kind": "error", "message": message[:MOST_CHARACTERS]}


def error_from(facts: Facts) -> QwenLoraError:
    """What `error_facts` was made of; a foreign exception becomes a QwenLoraError."""
    if facts["kind"] == "stopped":
        return Stopped(facts["signum"], facts["message"])
    return (InputError if facts["kind"] == "input" else QwenLoraError)(facts["message"])


def join_processes() -> Lifeline:
    """This process's line to the others that the launcher's environment describes.

    Raises QwenLoraError when not all of them come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1 or "RANK" not in os.environ:
        return Lifeline()
    if "LOCAL_RANK" not in os.environ:  # it chooses the GPU, and who downloads on this machine
        raise InputError(
            f"WORLD_SIZE is {size}, but LOCAL_RANK, this process's number on its machine, is "
            "missing (under Slurm: LOCAL_RANK=$SLURM_LOCALID)"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        found = rendezvous("env://", timeout=timedelta(seconds=JOIN_S))
        store, rank, size = next(iter(found))
        return Lifeline.connect(rank, size, PrefixStore(f"qwen-lora-{next(_joins)}", store), host)
    except ValueError as error:  # a variable is missing
        raise InputError(f"WORLD_SIZE is {size}, but {error}") from error
    except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
        raise QwenLoraError(
            f"the {size} processes of this run did not all come together at {host}:{port} within "
            f"{JOIN_S:.0f} s; see what the others say, and start all of them with the same "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from error


class Lifeline:
    """One process's socket to the hub. Alone (size 1) every method does nothing."""

    def __init__(self, rank: int = 0, size: int = 1, line: socket.socket | None = None) -> None:
        self.rank, self.size, self._line = rank, size, line
        self.store: Any = None  # torch's key-value store of all processes; it lives in process 0
        self._hub: Hub | None = None
        self._first: Facts | None = None
        self._told = False
        self._heard = threading.Event()  # of the first error, or that all are done
        self._over = threading.Event()  # the guarded block has been left
        if line is not None:
            threading.Thread(target=self._listen, name="qwen-lora-lifeline", daemon=True).start()

    @classmethod
    def connect(cls, rank: int, size: int, store: Any, host: str) -> Lifeline:
        """Meet at process 0, which `host` leads to; `store` tells the port."""
        if rank != 0:
            from torch.distributed import DistNetworkError

            try:
                port, token = json.loads(store.get(_KEY))
                line = socket.create_connection((host, port), timeout=LINK_S)
            except (DistNetworkError, ConnectionError) as error:  # it was there a moment ago
                raise QwenLoraError(killed(0)["message"]) from error
            keep_alive(line)
            send(line, {"rank": rank, "token": token})
            lifeline = cls(rank, size, line)
            lifeline.store = store
            return lifeline
        with listen_on(host, size) as server:
            token = secrets.token_hex(16)
            store.set(_KEY, json.dumps([server.getsockname()[1], token]))
            members = accept(server, token, size)
        own, members[0] = socket.socketpair()
        lifeline = cls(0, size, own)
        lifeline.store, lifeline._hub = store, Hub(members)
        return lifeline

    def check(self) -> None:
        """Raise what another process failed with, if one did. Costs nothing."""
        if self._first is not None:
            raise error_from(self._first)

    def tell(self, error: BaseException) -> Facts:
        """Say what went wrong here; returns what went wrong first. A later call says nothing."""
        facts = error_facts(error, self.rank)
        if self._line is None:
            return facts
        if not self._told:
            self._told = True
            sure = isinstance(error, QwenLoraError | KeyboardInterrupt)
            send(self._line, {"failed": facts, "sure": sure})
        self._heard.wait(CAUSE_S + 2)
        return self._first or facts

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell an error at once, before what surrounds the block is closed."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    @contextmanager
    def guard(self) -> Iterator[ExitStack]:
        """The whole work of a process. An error inside becomes the first error of all processes, on
        each of them; without one the block ends when all have come to its end. What is put on the
        stack is closed after that."""
        if self._line is None:
            with ExitStack() as ends:
                yield ends
            return
        try:
            with ExitStack() as ends:
                try:
                    yield ends
                    self._leave()
                except BaseException as error:
                    first = self.tell(error)
                    said = isinstance(error, QwenLoraError) and str(error) == first["message"]
                    if said or isinstance(error, KeyboardInterrupt):
                        raise
                    raise error_from(first) from error
        finally:
            self._over.set()
            self._close()

    def _leave(self) -> None:
        assert self._line is not None
        send(self._line, {"done": True})
        self._heard.wait()
        self.check()

    def _close(self) -> None:
        assert self._line is not None
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # wakes the listening thread
        self._line.close()
        if self._hub is not None:
            self._hub.join(CAUSE_S)  # closing it too early could lose what it has sent

    def _listen(self) -> None:
        """Wait for the one message of the hub; after an error see to it that this process ends."""
        assert self._line is not None
        message = receive(self._line)
        if self._over.is_set():
            return
        if message is None or "first" in message:
            self._first = killed(0) if message is None else message["first"]
            send(self._line, {"heard": True})
        self._heard.set()
        if self._first is None or self._over.wait(GRACE_S):
            return
        error = error_from(self._first)
        print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)
