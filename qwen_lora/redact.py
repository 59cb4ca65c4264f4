"""One redactor for everything that is printed or stored: no password, token or signature in it.

    redact("GET https://me:pw@host/a?sig=1f")           -> "GET https://***@host/a?sig=***"
    without_secrets("https://me:pw@host/a?v=2&token=x") -> "https://host/a?v=2"

It knows the places where secrets usually stand and the values of this process's own token
variables. It is a net under the rule that secrets are not put into texts, not a replacement for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit

HIDDEN = "***"
_SHORTEST_VALUE = 8  # shorter values of token variables ("1", "false") are also ordinary words

# HF_TOKEN, AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, ...; not HF_TOKEN_PATH or TOKENIZERS_PARALLELISM.
_VARIABLE = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|SECRET_KEY|ACCOUNT_KEY|ACCESS_KEY_ID"
    r"|SAS|CONNECTION_STRING)$",
    re.IGNORECASE,
)

# Names of URL parameters, header and dictionary keys, and assignments.
_SIGNATURE = r"x-(?:amz|goog|oss|cos)-[\w-]+|awsaccesskeyid|key-pair-id|signature|policy|sig"
_SECRET_KEY = (
    r"(?:[\w-]*[_-])?(?:token|secret|password|passwd|pwd|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|secret[_-]?key|account[_-]?key|credentials?)|accesskey"
)
_SECRET = rf"{_SECRET_KEY}|auth|key"
_PARAMETER = re.compile(rf"(?:{_SIGNATURE}|{_SECRET})\Z", re.IGNORECASE)
_USERINFO = re.compile(
    # `:/` is what pathlib makes of `://`; a single letter before it is a Windows drive
    r"(?:(?<=://)|(?<=[\w+.-]\w:/)(?!/))(?:[^\s/?#\"]{0,2048}@"
    # a password that should have been quoted: it holds / or ? or #
    r"|[^\s/@:?#\[\"]{0,256}:(?!\d{1,5}(?:[/?#\s]|\Z))[^\s@\"]{0,2048}@)"
)
_QUERY = re.compile(rf"([?&;#](?:{_SIGNATURE}|{_SECRET})=)[^\s&;#\"'<>]+", re.IGNORECASE)
# secret=x, "secret": "x", password: x. A bare `key=value` is an ordinary phrase, `'key': 'x'` not.
_ASSIGNED = re.compile(
    rf"(?<![\w-])((?:\\?[\"']key\\?[\"']\s*:\s*\\?[\"']|(?:{_SIGNATURE}|{_SECRET_KEY})"
    r"(?:\\?[\"'])?(?:\s*=\s*\\?[\"']?|\s*:\s*\\?[\"'])"
    r"|[\w-]*(?:secret|password|passwd)\s*:\s+)(?=[^\s\"'\\]))[^\s\"'&,;)}\]\\]+",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization(?:\\?[\"'])?\s*[:=,]\s*(?:b(?=[\"']))?(?:\\?[\"'])?)"
    r"(?:(?:bearer|basic|token|digest|aws4-hmac-sha256)\s+)?[^\s\"',\\]+",
    re.IGNORECASE,
)
_COOKIE = re.compile(r"\b((?:set-)?cookie[\"']?\s*:\s*[\"']?)[^\r\n\"']+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,})"
)


def redact(text: str) -> str:
    """`text` with every secret that can be told as one replaced by `***`.

    Hidden are user:password@ in URLs, signature and token parameters, Authorization, Cookie and
    Bearer values, Hugging Face, GitHub and AWS keys, key=value pairs whose key names a secret, and
    the values of environment variables such as HF_TOKEN. Doing it twice changes nothing more.
    """
    for value in _known_values():
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(f"{HIDDEN}@", text)
    text = _HEADER.sub(rf"\g<1>{HIDDEN}", text)
    text = _COOKIE.sub(rf"\g<1>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<1>{HIDDEN}", text)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def without_secrets(url: str) -> str:
    """A URL that names the same thing for everybody: no user, password, token or signature.

    Parameters that sign or authorise are left out, so that a link signed anew has the same name.
    Anything that is not a URL comes back as it is, redacted.
    """
    if "://" not in url:
        return redact(url)
    try:
        parts = urlsplit(_USERINFO.sub("", url))
    except ValueError:  # a broken IPv6 address
        return redact(url)
    query = "&".join(
        pair
        for pair in parts.query.split("&")
        if pair and not _PARAMETER.match(pair.partition("=")[0])
    )
    fragment = "" if _QUERY.search(f"#{parts.fragment}") else parts.fragment
    return redact(urlunsplit(parts._replace(query=query, fragment=fragment)))


def _known_values() -> list[str]:
    """The secrets in this process's environment as they may be spelled in a text, longest first."""
    spelled: set[str] = set()
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value.strip()) >= _SHORTEST_VALUE:
            value = value.strip()
            escaped = json.dumps(value)[1:-1], repr(value)[1:-1]
            spelled |= {value, quote(value, safe=""), quote(value), quote_plus(value), *escaped}
    return sorted(spelled, key=len, reverse=True)


def redact_values(value: Any) -> Any:
    """The same JSON value with every text in it redacted, keys aside."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(part) for part in value]
    return value


def redact_stderr() -> None:
    """Redact what this process writes to stderr from now on: messages, logs, warnings, tracebacks,
    its own and its libraries'."""
    if not isinstance(sys.stderr, _RedactedStream):
        sys.stderr = cast(TextIO, _RedactedStream(sys.stderr))


class _RedactedStream:
    """A text stream whose every write passes through `redact`. A terminal that is gone or a full
    disk under a log is no reason to stop: what cannot be said is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
