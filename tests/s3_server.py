"""An S3 stand-in (moto's server) behind a proxy that breaks answers as it is told to."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "some-bucket"
SECRET = "wJalrXUtnFEMI-secret-of-the-test"
SIGNED = {  # moto asks who it is, and believes it
    "Host": "localhost",
    "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request",
}
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "server", "date"}


@dataclass(frozen=True)
class Fault:
    """What becomes of one request.

    reset   dropped before it reaches the store        lost    done, but the answer is dropped
    status  answered with `number` (503: SlowDown)     cut     the body ends after `number` bytes
    stall   no answer for `seconds`                    flip    one bit of the body is another
    call    it is answered rightly

    If there is an `act`, it is called first.
    """

    kind: str
    number: int = 0
    seconds: float = 0.0
    act: Callable[[], None] | None = None


class S3Server:
    """Use in a `with` block; `url` is what AWS_ENDPOINT_URL has to be.

    `faults` are for the next requests, one each; None lets one through.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.faults: deque[Fault | None] = deque()
        self.requests: list[str] = []  # method and path, as they came
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._lock = threading.Lock()
        self._at_work = 0

    def __enter__(self) -> S3Server:
        self._moto.start()
        self.moto_host, self.moto_port = self._moto.get_host_and_port()
        server = self

        class Handler(_Handler):
            owner = server

        self._proxy = _Proxy(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        self.direct("PUT", "")
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._thread.join()
        self._proxy.server_close()
        self._moto.stop()
        server = self._moto._server
        if server is not None:
            server.server_close()

    def next_fault(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            return self.faults.popleft() if self.faults else None

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a request is dealt with."""
        with self._lock:
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1

    def settle(self) -> None:
        """Wait for the requests of a client that is gone: the store may still carry them out."""
        quiet = 0
        while quiet < 5:
            time.sleep(0.02)
            with self._lock:
                quiet = 0 if self._at_work else quiet + 1

    # ---- the store itself, past proxy and client -------------------------------------------------

    def direct(self, method: str, key: str, body: bytes = b"") -> tuple[int, bytes]:
        """One request to the store about an object of the bucket."""
        connection = http.client.HTTPConnection(self.moto_host, self.moto_port)
        try:
            connection.request(method, f"/{BUCKET}/{key}".rstrip("/"), body, SIGNED)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def put(self, key: str, body: bytes) -> None:
        assert self.direct("PUT", key, body)[0] == 200

    def get(self, key: str) -> bytes | None:
        status, body = self.direct("GET", key)
        return body if status == 200 else None

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below `prefix`, by the rest of its key."""
        keys = self.keys(f"{prefix}/")
        return {key.removeprefix(f"{prefix}/"): self.get(key) or b"" for key in keys}

    def delete(self, key: str) -> None:
        self.direct("DELETE", key)

    def keys(self, prefix: str) -> list[str]:
        import re

        _, body = self.direct("GET", f"?list-type=2&prefix={prefix}")
        return re.findall(r"<Key>([^<]+)</Key>", body.decode())

    def uploads(self) -> int:
        """Multipart uploads that were begun and neither completed nor aborted."""
        return self.direct("GET", "?uploads")[1].count(b"<UploadId>")


@contextmanager
def s3_stand_in() -> Iterator[S3Server]:
    """A server, with the environment of this process pointing to it."""
    with S3Server() as server, pytest.MonkeyPatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL", server.url)
        changed.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        changed.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        changed.setenv("AWS_DEFAULT_REGION", "us-east-1")
        changed.setenv("AWS_EC2_METADATA_DISABLED", "true")
        changed.setenv("AWS_CONFIG_FILE", os.devnull)
        changed.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield server


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: S3Server

    def handle_any(self) -> None:
        with self.owner.working():
            self._deal_with_it()

    def _deal_with_it(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.next_fault(f"{self.command} {self.path}") or Fault("none")
        if fault.act is not None:
            fault.act()
        if fault.kind == "reset":
            return self._drop()
        if fault.kind == "status":
            return self._refuse(fault.number)
        if fault.kind == "stall":
            threading.Event().wait(fault.seconds)
            return self._drop()
        connection = http.client.HTTPConnection(self.owner.moto_host, self.owner.moto_port)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault.kind == "lost":
            return self._drop()
        self._answer(answer, content, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def _answer(self, answer: http.client.HTTPResponse, content: bytes, fault: Fault) -> None:
        length = answer.headers.get("Content-Length", str(len(content)))
        if fault.kind == "flip" and content:
            at = fault.number % (8 * len(content))
            changed = bytearray(content)
            changed[at // 8] ^= 1 << at % 8
            content = bytes(changed)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.kind == "cut" and content:
            self.wfile.write(content[: fault.number % len(content)])
            return self._drop(reset=bool(fault.number % 2))
        self.wfile.write(content)

    def _refuse(self, status: int) -> None:
        code = {503: "SlowDown", 500: "InternalError"}.get(status, "Refused")
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(body)

    def _drop(self, reset: bool = True) -> None:
        if reset:  # RST instead of FIN
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Quiet."""
