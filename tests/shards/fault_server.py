"""A web server over a folder that does what a script says, one entry a request."""

from __future__ import annotations

import gzip
import random
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = (
    "fine",
    "503",
    "429",
    "500",
    "reset",  # closed before an answer
    "cut",  # closed in the middle of the body
    "cut-silently",  # so, and no length was said
    "no-range",  # the whole object, whatever was asked for
    "wrong-range",  # another part than was asked for
    "flipped",  # a byte of the body is another
    "chunked",  # no length, but a proper end
    "weak-etag",
    "no-etag",
)
FATAL = ("404", "403", "html", "gzip", "changed", "to-http")


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that go away are part of the tests."""


class FaultServer:
    """`script` is used up from the front; then all is fine. `log` has what came."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.script = folder, list[str]()
        self.log: list[tuple[str, dict[str, str]]] = []
        self.etag = "v1"
        self.redirect_to = ""
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                """Nothing is printed."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            fault = self.script.pop(0) if self.script else "fine"
            headers = {key.lower(): value for key, value in request.headers.items()}
            self.log.append((request.path, headers))
        path = self.folder / Path(request.path).name
        if fault == "reset":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        elif fault in ("503", "429", "500", "403") or not path.is_file() or fault == "404":
            status = int(fault) if fault.isdigit() else 404
            self._send(request, status, b"no", {"Retry-After": "0"})
        elif fault == "html":
            self._send(request, 200, b"<html>sign in</html>", {"Content-Type": "text/html"})
        elif fault == "redirect":
            target = f"{self.redirect_to}{request.path}"
            self._send(request, 302, b"", {"Location": target})
        elif fault == "to-ftp":
            self._send(request, 302, b"", {"Location": "ftp://elsewhere/x"})
        else:
            self._body(request, path.read_bytes(), headers, fault)

    def _body(
        self, request: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], fault: str
    ) -> None:
        if fault == "changed":
            self.etag += "x"
        etag = {"weak-etag": f'W/"{self.etag}"', "no-etag": ""}.get(fault, f'"{self.etag}"')
        extra = {"ETag": etag} if etag else {}
        if fault == "gzip":
            body = gzip.compress(data)
            return self._send(request, 200, body, {**extra, "Content-Encoding": "gzip"})
        asked = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        same = headers.get("if-range") in (None, etag)
        start = int(asked[1]) if asked and same and fault != "no-range" else 0
        if asked and start >= len(data):
            return self._send(request, 416, b"", extra)
        status = 206 if start else 200
        if start:
            said = start + 1 if fault == "wrong-range" else start
            extra["Content-Range"] = f"bytes {said}-{len(data) - 1}/{len(data)}"
        body = bytearray(data[start:])
        if fault == "flipped" and body:
            body[len(body) // 2] ^= 1
        self._send(request, status, bytes(body), extra, fault)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        fault: str = "fine",
    ) -> None:
        try:
            request.send_response(status)
            for key, value in headers.items():
                request.send_header(key, value)
            if fault == "chunked":
                request.send_header("Transfer-Encoding", "chunked")
                request.end_headers()
                for start in range(0, len(body), 5000):
                    part = body[start : start + 5000]
                    request.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                request.wfile.write(b"0\r\n\r\n")
                return
            if fault == "cut-silently":
                request.send_header("Connection", "close")
                request.close_connection = True
            else:
                request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            if fault.startswith("cut"):
                request.wfile.write(body[: len(body) // 2])
                request.close_connection = True
            else:
                request.wfile.write(body)
        except OSError:  # the client has gone
            request.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[FaultServer]:
    server = FaultServer(folder)
    try:
        yield server
    finally:
        server.close()


def random_script(random_: random.Random) -> list[str]:
    """Up to 25 requests, mostly with faults that pass; now and then one that does not."""
    script = random_.choices(FAULTS, k=random_.randrange(1, 25))
    if random_.random() < 0.15:
        script.insert(random_.randrange(len(script) + 1), random_.choice(FATAL[:-1]))
    return script
