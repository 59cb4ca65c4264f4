"""What the lines of `qwen_lora.lifeline` lead to: a thread in process 0 that hears every process.

Messages are lines of JSON: {"failed": facts, "sure": bool}, {"done": true} and {"heard": true} to
the hub, {"first": facts} or {"done": true} from it.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from qwen_lora.errors import QwenLoraError

Facts = dict[str, Any]  # an error as JSON: message, kind and, of a signal, signum

LINK_S = 30.0  # for the sockets to be connected, once all processes have started
CAUSE_S = 3.0  # an error that may follow from another process's waits this long for that one's
MOST_BYTES = 1 << 16  # of a message


def killed(rank: int) -> Facts:
    message = (
        f"process {rank} ended without a word: it was killed (by the kernel when memory ran out?) "
        "or crashed; what was saved before is intact"
    )
    return {"kind": "error", "message": message}


class Hub(threading.Thread):
    """Hears every process and tells all of them the first error, or that all are done."""

    def __init__(self, members: dict[int, socket.socket]) -> None:
        super().__init__(name="qwen-lora-hub", daemon=True)
        self._members = members
        self._open = set(members)  # those that may still say something
        self._done: set[int] = set()
        self._decided = False
        self._unsure: tuple[float, Facts] | None = None  # when it counts, unless a cause comes
        self.start()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, member in self._members.items():
                selector.register(member, selectors.EVENT_READ, rank)
            while self._open:
                timeout = None
                if self._unsure is not None and not self._decided:
                    timeout = max(0.0, self._unsure[0] - time.monotonic())
                for key, _ in selector.select(timeout):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        self._open.discard(key.data)
                if self._unsure is not None and time.monotonic() >= self._unsure[0]:
                    self._decide(self._unsure[1])
        for member in self._members.values():
            member.close()

    def _hear(self, rank: int) -> bool:
        """Take one message; False when nothing more will come."""
        message = receive(self._members[rank])
        if message is None:
            if rank not in self._done:
                self._decide(killed(rank))
            return False
        if "failed" in message:
            if message["sure"]:
                self._decide(message["failed"])
            elif self._unsure is None:
                self._unsure = time.monotonic() + CAUSE_S, message["failed"]
        elif "done" in message:
            self._done.add(rank)
            if len(self._done) == len(self._members):
                self._tell_all({"done": True})
        return "heard" not in message

    def _decide(self, first: Facts) -> None:
        if not self._decided:
            self._decided = True
            self._tell_all({"first": first})

    def _tell_all(self, message: dict[str, Any]) -> None:
        self._decided = True
        for member in self._members.values():
            send(member, message)


def listen_on(host: str, backlog: int) -> socket.socket:
    """A port at the address by which the others reach process 0. On all addresses only where that
    name says nothing here: a service in front of this machine, or a host name that /etc/hosts gives
    a loopback address."""
    named_here = host == "localhost" or host.startswith("127.") or host == "::1"
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, _, _, _, address in found:
        if named_here or not ip_address(str(address[0]).partition("%")[0]).is_loopback:
            with suppress(OSError):
                return socket.create_server(address[:2], family=family, backlog=backlog)
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), backlog=backlog)
    family = socket.AF_INET6
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=True)


def accept(server: socket.socket, token: str, size: int) -> dict[int, socket.socket]:
    """The sockets of processes 1 to size - 1. Whoever does not know the token is sent away."""
    members: dict[int, socket.socket] = {}
    until = time.monotonic() + LINK_S
    while len(members) < size - 1:
        server.settimeout(max(0.01, until - time.monotonic()))
        try:
            member, _ = server.accept()
        except TimeoutError:
            missing = next(rank for rank in range(1, size) if rank not in members)
            for member in members.values():
                send(member, {"first": killed(missing)})
            raise QwenLoraError(killed(missing)["message"]) from None
        member.settimeout(LINK_S / 10)
        hello = receive(member) or {}
        if secrets.compare_digest(str(hello.get("token")).encode(), token.encode()):
            members[int(hello["rank"])] = member
            keep_alive(member)
        else:
            member.close()
    return members


def keep_alive(line: socket.socket) -> None:
    """Blocking from now on; the kernel notices within half a minute when the machine at the other
    end is gone, which closes nothing."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def send(line: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # the other end is gone: its reader hears of that
        line.sendall(json.dumps(message).encode() + b"\n")


def receive(line: socket.socket) -> dict[str, Any] | None:
    """The next message; None when there will be none."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            # Byte by byte: what follows the line stays in the socket. Messages are short and rare.
            if not (byte := line.recv(1)):
                return None
            data += byte
            if len(data) > MOST_BYTES:
                return None
        message = json.loads(data)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
