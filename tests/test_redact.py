"""Secrets are told by where they stand or by this process's environment; plain texts stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_lora.errors import InputError
from qwen_lora.redact import redact, redact_values, without_secrets

SECRET = "Zq7secretZq7"

WHERE = [
    f"GET https://me:{SECRET}@host/set failed",
    f"GET https://{SECRET}@host/set failed",
    f"https:/me:{SECRET}@host/set: folded by pathlib",
    f"https://me:{SECRET}/with?odd#signs@host/set",
    f"https://host/a.tar?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&v=1",
    f"https://host/a.tar?v=1&token={SECRET}",
    f"https://store/a?sv=2024&sig={SECRET}%2B%3D",
    f"https://storage/a?X-Goog-Signature={SECRET}",
    f"https://host/a#access_token={SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"Authorization: Basic {SECRET}==",
    f"{{'authorization': 'token {SECRET}'}}",
    f"authorization: AWS4-HMAC-SHA256 Credential={SECRET}/20260101, Signature={SECRET}",
    f"Cookie: session={SECRET}; other=1",
    f"sent bearer {SECRET}.abc",
    f"{{'key': '{SECRET}', 'secret': '{SECRET}', 'token': \"{SECRET}\"}}",
    f'{{"aws_secret_access_key": "{SECRET}"}}',
    f"aws_secret_access_key = {SECRET}",
    f"password: {SECRET}",
    f"hf_{SECRET * 2}",
    "AKIA" + SECRET.upper() * 2,
]

PLAIN = [
    "text.template: old -> new; a key stands twice",
    "unknown setting key: lerning_rate; did you mean learning_rate?",
    "use --set key=value or --set data_config.img_size=512",
    "token lengths 12 to 512, tokens: 512 -> 1024",
    "hf://datasets/user/name@main/shard-0123456789ab.tar, sample 00ff",
    "http://host:8080/a@b and s3://bucket/set?versionId=3",
    "/home/me/photos@2x/a.png is 3 bytes; C:/me@work/x",
    "the tokenizer's template prefix is 34 tokens, policy 'clip'",
    "sha256 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
]


@pytest.mark.parametrize("text", WHERE)
def test_a_secret_is_hidden_wherever_it_usually_stands(text: str) -> None:
    hidden = redact(text)
    assert SECRET not in hidden and SECRET.upper() not in hidden and "***" in hidden
    assert redact(hidden) == hidden


@pytest.mark.parametrize("text", PLAIN)
def test_plain_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "MY_SECRET"]
)
def test_values_of_token_variables_are_hidden_in_every_spelling(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, 'p/+ "q' + SECRET)
    quoted = "p%2F%2B%20%22q" + SECRET
    for text in (f'x p/+ "q{SECRET} y', f"x {quoted} y", f'x p/+ \\"q{SECRET} y'):
        assert redact(text) == "x *** y"


@pytest.mark.parametrize("name", ["HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "HOME"])
def test_values_of_other_variables_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/somewhere/else")
    assert redact("at /somewhere/else") == "at /somewhere/else"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://me:pw@host:80/a?v=2&token=x#part", "https://host:80/a?v=2#part"),
        ("https://host/a?X-Amz-Date=1&X-Amz-Signature=2&X-Amz-Expires=3", "https://host/a"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("https://host/a#access_token=1", "https://host/a"),
        ("/a/b?c", "/a/b?c"),
    ],
)
def test_a_url_without_secrets_names_the_same_thing(url: str, name: str) -> None:
    assert without_secrets(url) == name


def test_errors_hold_no_secret() -> None:
    assert SECRET not in str(InputError(WHERE[0])) and SECRET not in repr(InputError(WHERE[4]))


def test_nested_values_are_redacted() -> None:
    value = {"a": [WHERE[0], 1, None], "b": {"c": (WHERE[5],)}}
    assert SECRET not in str(redact_values(value))


def test_everything_on_stderr_is_redacted() -> None:
    """Logs with arguments, warnings, threads' and the interpreter's own tracebacks."""
    program = (
        "import logging, os, sys, threading, warnings\n"
        "from qwen_lora.redact import redact_stderr\n"
        "redact_stderr()\n"
        "secret = os.environ['HF_TOKEN']\n"
        "logging.warning('logged %s', secret)\n"
        "warnings.warn(secret)\n"
        "def fail(): raise ValueError(secret)\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "print('printed', secret, file=sys.stderr)\n"
        "fail()\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"HF_TOKEN": SECRET, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert SECRET not in done.stderr and done.stderr.count("***") >= 5
    assert "ValueError" in done.stderr and "logged" in done.stderr and "printed" in done.stderr


def test_hostile_texts_take_no_time() -> None:
    for piece in ("a_", "://a:b", "?token", "secret ", "x-amz-", "-", "authorization:"):
        text = piece * (100_000 // len(piece))
        begin = time.perf_counter()
        redact(text)
        assert time.perf_counter() - begin < 5, piece
