"""A web server over a folder, with a rate for all its connections together and a delay before each
answer. `python benchmarks/throttled.py FOLDER MB_PER_S DELAY_MS` prints its port and serves."""

from __future__ import annotations

import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 256 << 10


class Rate:
    """Hands out bytes, `per_second` of them, to whoever asks first."""

    def __init__(self, per_second: float) -> None:
        self._per_second, self._free_at = per_second, 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / self._per_second
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


def make_server(folder: Path, per_second: float, delay_s: float) -> ThreadingHTTPServer:
    rate = Rate(per_second)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay_s)
            path = folder / Path(self.path).name
            if not path.is_file():
                self.send_error(404)
                return
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start, size = int(asked[1]) if asked else 0, path.stat().st_size
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("Content-Length", str(size - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            with open(path, "rb") as file:
                file.seek(start)
                while piece := file.read(PIECE):
                    rate.take(len(piece))
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


if __name__ == "__main__":
    running = make_server(Path(sys.argv[1]), float(sys.argv[2]) * 1e6, float(sys.argv[3]) / 1e3)
    print(running.server_address[1], flush=True)
    running.serve_forever()
