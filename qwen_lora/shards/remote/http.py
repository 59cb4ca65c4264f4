"""Shard sets on a web server, through the HTTP client that huggingface_hub brings.

Bodies are asked for as they are (identity encoding). A broken transfer goes on with a range, under
`If-Range` where the server gave a strong ETag; a server that ignores ranges costs the first bytes
once more. Redirects are followed here: never from https to http, and without credentials to another
host.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from qwen_lora.errors import InputError
from qwen_lora.redact import without_secrets
from qwen_lora.shards.remote.base import ChangedRemotely, Remote, RemoteError, never_stop
from qwen_lora.shards.remote.retries import Patience, Retries, Transient

CONNECT_SECONDS, STALL_SECONDS = 10.0, 30.0
LONGEST_RETRY_AFTER = 60.0
REDIRECTS = 5
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTING = frozenset({301, 302, 303, 307, 308})
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def open_http_remote(url: str) -> HttpRemote:
    """The set below an http(s) URL. Raises InputError for one with a password or a query."""
    parts = urlsplit(url)
    label = without_secrets(url).partition("?")[0].partition("#")[0].rstrip("/")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"{label}: a shard set's URL has no user, password, ? or # part; it names a folder"
        )
    if not parts.hostname:
        raise InputError(f"{label} names no host")
    return HttpRemote(label)


@dataclass(frozen=True)
class _Answer:
    """A body from byte `start` on."""

    start: int
    size: int | None  # of the whole object; None where the server does not say
    version: str | None  # a strong ETag, else None
    chunks: Iterator[bytes]


class HttpRemote(Remote):
    """See `Remote`; it can only be read. `headers` go to the URL's own host alone."""

    def __init__(
        self,
        label: str,
        base: str | None = None,
        headers: Mapping[str, str] | None = None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> None:
        self.label, self._base = label, base or label
        self._patience = patience
        self._library = client_library()
        timeout = self._library.Timeout(STALL_SECONDS, connect=CONNECT_SECONDS)
        self._client = self._library.Client(timeout=timeout, follow_redirects=False)
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._versions: dict[str, str | None] = {}  # of the objects that fetches have begun
        self._lock = threading.Lock()

    def read(
        self, name: str, most_bytes: int, check: Callable[[], None] = never_stop
    ) -> tuple[bytes, str | None]:
        retries = Retries(self.where(name), self._patience, check)
        while True:
            try:
                with self._get(name, 0, None) as answer:
                    return self._whole(name, answer, most_bytes, check), answer.version
            except Transient as error:
                self._wait(error, retries, check)

    def _whole(
        self, name: str, answer: _Answer, most_bytes: int, check: Callable[[], None]
    ) -> bytes:
        data = bytearray()
        for chunk in answer.chunks:
            check()
            data += chunk
            if len(data) > most_bytes:
                raise RemoteError(
                    f"{self.where(name)}: more than the {most_bytes} bytes that it can have"
                )
        if answer.size is not None and len(data) != answer.size:
            raise Transient(f"{len(data)} of {answer.size} bytes came")
        return bytes(data)

    def fetch(
        self, name: str, size: int, file: BinaryIO, check: Callable[[], None] = never_stop
    ) -> None:
        retries = Retries(self.where(name), self._patience, check)
        while file.tell() < size:
            check()
            try:
                self._go_on(name, size, file, retries, check)
            except Transient as error:
                self._wait(error, retries, check)

    def _go_on(
        self,
        name: str,
        size: int,
        file: BinaryIO,
        retries: Retries,
        check: Callable[[], None],
    ) -> None:
        """One request: append what is missing of `size` bytes, or part of it."""
        start = file.tell()
        with self._lock:
            known = self._versions.get(name)
        with self._get(name, start, known) as answer:
            if answer.size not in (None, size):
                raise ChangedRemotely(
                    f"{self.where(name)} has {answer.size} bytes, {size} are expected"
                )
            if start and known is not None and answer.version not in (None, known):
                raise ChangedRemotely(f"{self.where(name)} is another object than before")
            with self._lock:
                self._versions[name] = answer.version
            skip = start - answer.start  # the server ignored the range
            for chunk in answer.chunks:
                check()
                new = chunk[skip:]
                skip = max(0, skip - len(chunk))
                if file.tell() + len(new) > size:
                    raise ChangedRemotely(f"{self.where(name)} is longer than {size} bytes")
                if new:
                    file.write(new)
                    file.flush()
                    retries.arrived(len(new))
        if file.tell() < size:
            raise Transient(f"the connection ended at byte {file.tell()} of {size}")

    def close(self) -> None:
        self._client.close()

    # ---- one request -----------------------------------------------------------------------------

    @contextmanager
    def _get(self, name: str, start: int, version: str | None) -> Generator[_Answer]:
        """Raises Transient, FileNotFoundError, ChangedRemotely or RemoteError."""
        url = f"{self._base}/{quote(name)}"
        headers = dict(self._headers)
        if start:
            headers["Range"] = f"bytes={start}-"
            if version is not None:
                headers["If-Range"] = version
        response = self._follow(url, headers)
        try:
            self._check_status(name, response)
            yield self._answer(name, response, start)
        except self._library.TransportError as error:
            raise Transient(f"the connection broke ({type(error).__name__})") from None
        finally:
            response.close()

    def _follow(self, url: str, headers: dict[str, str]) -> Any:
        """The response behind at most REDIRECTS redirects, its body not yet read."""
        for _ in range(REDIRECTS + 1):
            try:
                request = self._client.build_request("GET", url, headers=headers)
                response = self._client.send(request, stream=True)
            except self._library.TransportError as error:
                raise Transient(f"no answer ({type(error).__name__})") from None
            target = response.headers.get("location")
            if response.status_code not in REDIRECTING or target is None:
                return response
            response.close()
            before, url = url, str(self._library.URL(url).join(target))
            here, there = urlsplit(before), urlsplit(url)
            if there.scheme not in ("http", "https") or (here.scheme, there.scheme) == (
                "https",
                "http",
            ):
                raise RemoteError(
                    f"{without_secrets(before)} redirects to {without_secrets(url)}: from https "
                    "only https is followed"
                )
            if (here.hostname, here.port) != (there.hostname, there.port):
                allowed = ("accept-encoding", "range", "if-range")
                headers = {k: v for k, v in headers.items() if k.lower() in allowed}
        raise RemoteError(f"{without_secrets(url)}: more than {REDIRECTS} redirects")

    def _check_status(self, name: str, response: Any) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status in (404, 410):
            raise FileNotFoundError(self.where(name))
        if status == 416:
            raise ChangedRemotely(f"{self.where(name)} is shorter than it was")
        if status in TRANSIENT:
            error = Transient(f"HTTP {status}")
            error.after = _retry_after(response)  # type: ignore[attr-defined]
            raise error
        if status in (401, 403):
            raise RemoteError(
                f"{self.where(name)}: access denied (HTTP {status}); check the address, and that "
                "this machine may read it"
            )
        raise RemoteError(f"{self.where(name)}: unexpected answer HTTP {status}")

    def _answer(self, name: str, response: Any, start: int) -> _Answer:
        headers = response.headers
        encoding = headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RemoteError(
                f"{self.where(name)}: the server sent it encoded as {encoding!r}, which was not "
                "asked for; serve shard sets as they are"
            )
        if "html" in headers.get("content-type", ""):
            raise RemoteError(
                f"{self.where(name)}: a web page came in place of the file; give the address that "
                "the files lie under, and sign in where that is needed"
            )
        etag = headers.get("etag")
        version = etag if etag and not etag.startswith("W/") else None
        size: int | None = None
        first = 0
        if response.status_code == 206:
            found = _RANGE.fullmatch(headers.get("content-range", ""))
            if found is None or int(found[1]) != start:
                raise Transient("an answer for another range came")
            first, size = start, int(found[3])
        elif headers.get("content-length", "").isdigit():
            size = int(headers["content-length"])
        return _Answer(first, size, version, response.iter_raw())

    def _wait(self, error: Transient, retries: Retries, check: Callable[[], None]) -> None:
        end = time.monotonic() + getattr(error, "after", 0.0)
        while (left := end - time.monotonic()) > 0:
            check()
            time.sleep(min(left, 0.2))
        retries.failed(error)


def client_library() -> Any:
    """httpx, or whatever huggingface_hub has in its place: they share an interface."""
    from importlib import import_module

    from huggingface_hub import get_session

    return import_module(type(get_session()).__module__.partition(".")[0])


def _retry_after(response: Any) -> float:
    """Seconds that the server asks for; 0 where it does not, or names a date."""
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_RETRY_AFTER) if value.isdigit() else 0.0
