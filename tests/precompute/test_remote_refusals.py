"""What `precompute --output URL` refuses: in one line, before a model is looked for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.posix import exclusive_lock
from qwen_lora.precompute import run
from qwen_lora.shards.remote import objects
from qwen_lora.shards.remote.retries import Patience
from tests.s3_server import BUCKET, SECRET, Fault, S3Server, s3_stand_in

HASTE = Patience(attempts=3, first_wait_s=0.001, longest_wait_s=0.01, stall_s=1.0)
SET = f"s3://{BUCKET}/refused"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_stand_in() as server:
        yield server


@pytest.fixture
def refuse(
    s3: S3Server, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """`refuse(code, *arguments)`: the one line that the command ends with."""

    def looked_for(*arguments: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(run, "resolve_model", looked_for)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path / "cache"))
    opened = objects.open_object_remote
    monkeypatch.setattr(objects, "open_object_remote", lambda url: opened(url, HASTE))
    s3.faults.clear()

    def refused(code: int, *arguments: str | Path) -> str:
        words = ["precompute", image_folder, *arguments]
        result = CliRunner().invoke(app, [str(word) for word in words])
        said = result.output
        assert result.exit_code == code, said
        settings, error, line = said.rpartition("error: ")
        assert error and "error" not in settings.replace("caption_source=error", ""), said
        assert line.count("\n") == 1 and line.endswith("\n"), said
        assert SECRET not in said and "AKIA" not in said and "hunter2" not in said
        assert not (tmp_path / "cache").exists() and s3.keys("refused") == []
        return line

    return refused


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.org/set", "https://example.org/set can only be read; write to a folder"),
        ("hf://datasets/owner/name", "can only be read; write to a folder or an s3:// URL"),
        ("nosuch://bucket/set", "Protocol not known: nosuch"),
        ("gs://bucket/set", "gs://bucket/set needs one more package of fsspec's"),
        ("s3:///set", "names no bucket"),
        ("s3://no-such-bucket/set", "s3://no-such-bucket/set.*: there is no such bucket"),
        ("s3://AKIAIOSFODNN7EXAMPLE:hunter2hunter2@bucket/set", "holds credentials; leave them"),
        ("s3://bucket/set?X-Amz-Signature=hunter2hunter2", r"has no \? or # part"),
    ],
)
def test_places_that_cannot_be_written(refuse: Callable[..., str], url: str, said: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if url.startswith("gs:"):
            patch.setitem(sys.modules, "gcsfs", None)
        refused = refuse(2, "--output", url)
    assert re.search(said, refused), refused


def test_a_missing_package_is_named(refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules, "qwen_lora.shards.remote.s3", raising=False)
    assert f"{SET} needs s3fs: pip install 'qwen-lora[remote]'" in refuse(2, "--output", SET)


def test_no_credentials(s3: S3Server, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is asked as anybody may, and lets nobody write."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3.faults.append(Fault("status", 403))
    said = refuse(2, "--output", SET)
    assert f"{SET}: no credentials to write with" in said and "AWS_ACCESS_KEY_ID" in said


def test_credentials_that_may_not_write(s3: S3Server, refuse) -> None:
    s3.faults.append(Fault("status", 403))
    said = refuse(1, "--output", SET)
    assert "access denied" in said and "403" in said


def test_a_store_that_does_not_answer(refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert f"{SET}: EndpointConnectionError" in refuse(1, "--output", SET)


def test_a_state_folder_that_cannot_be_used(
    refuse, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "leave --state-dir out" in refuse(2, "--output", "shards", "--state-dir", "state")
    assert not (tmp_path / "shards").exists() and not (tmp_path / "state").exists()
    inside = image_folder / "state"
    assert "name another --state-dir" in refuse(2, "--output", SET, "--state-dir", inside)
    monkeypatch.setattr(run, "resolve_model", lambda *arguments: None)
    (tmp_path / "file").write_text("mine")
    said = refuse(2, "--output", SET, "--state-dir", tmp_path / "file")
    assert "the output" in said and "as --state-dir" in said
    with exclusive_lock(tmp_path / "state" / "lock", "it"):
        said = refuse(2, "--output", SET, "--state-dir", tmp_path / "state")
    assert f"the shard set {SET} is in use by process {os.getpid()}" in said
