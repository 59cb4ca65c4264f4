"""Writing to an object store (moto's S3 server): whole or not at all, over nobody's work."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qwen_lora.shards.remote import objects
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError
from qwen_lora.shards.remote.objects import ObjectRemote
from tests.s3_server import Fault, S3Server
from tests.shards.object_store import HASTE, no_fault_left, remote, s3

__all__ = ["no_fault_left", "remote", "s3"]


@pytest.mark.parametrize("kind", ["reset", "lost", "status", "cut"])
def test_a_put_under_faults_is_whole(
    s3: S3Server, remote: ObjectRemote, tmp_path: Path, kind: str
) -> None:
    content = random.Random(kind).randbytes(100_000)
    source = tmp_path / "source"
    source.write_bytes(content)
    s3.delete("set/put.tar")
    s3.faults += [Fault(kind, 503)] * 2
    remote.put("put.tar", source)
    assert s3.get("set/put.tar") == content


def test_an_object_of_the_same_length_is_not_sent_again(
    s3: S3Server, remote: ObjectRemote, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    s3.delete("set/put.tar")
    remote.put("put.tar", source, resumed=True)
    del s3.requests[:]
    remote.put("put.tar", source, resumed=True)
    assert [request.split()[0] for request in s3.requests] == ["HEAD"]
    s3.put("set/put.tar", b"54321")
    remote.put("put.tar", source)
    assert s3.get("set/put.tar") == b"12345"


def test_a_long_file_goes_up_in_parts(s3: S3Server, remote: ObjectRemote, tmp_path: Path) -> None:
    source = tmp_path / "long"
    source.write_bytes(random.Random(5).randbytes(objects.ONE_PUT_BYTES + 77))
    s3.faults += [Fault("lost"), None, Fault("status", 503), None, Fault("reset")]
    remote.put("long.tar", source)
    assert s3.get("set/long.tar") == source.read_bytes()
    assert sum(request.startswith("PUT") for request in s3.requests) >= 3


def test_a_failed_upload_leaves_nothing(s3: S3Server, remote: ObjectRemote, tmp_path: Path) -> None:
    source = tmp_path / "long"
    source.write_bytes(b"\1" * (objects.ONE_PUT_BYTES + 1))
    before = s3.uploads()
    s3.faults += [None, None, *[Fault("status", 503)] * HASTE.attempts]
    with pytest.raises(RemoteError, match="given up"):
        remote.put("failed.tar", source)
    assert s3.get("set/failed.tar") is None
    assert s3.uploads() == before


def test_a_completed_upload_whose_answer_is_lost(
    s3: S3Server, remote: ObjectRemote, tmp_path: Path
) -> None:
    source = tmp_path / "long"
    source.write_bytes(b"\2" * (objects.ONE_PUT_BYTES + 1))
    s3.faults += [None, None, None, None, Fault("lost")]
    remote.put("lost.tar", source)
    assert not s3.faults
    assert s3.get("set/lost.tar") == source.read_bytes()


def test_only_the_first_of_two_conditional_writes_succeeds(
    s3: S3Server, remote: ObjectRemote
) -> None:
    s3.delete("set/manifest.json")
    first = remote.replace("manifest.json", b"one", None)
    with pytest.raises(ChangedRemotely):
        remote.replace("manifest.json", b"two", None)
    second = remote.replace("manifest.json", b"two", first)
    with pytest.raises(ChangedRemotely):
        remote.replace("manifest.json", b"three", first)
    assert remote.read("manifest.json", 10) == (b"two", second)
    s3.delete("set/manifest.json")
    with pytest.raises(ChangedRemotely, match="is gone"):
        remote.replace("manifest.json", b"three", second)


@pytest.mark.parametrize("there", [None, b"one"])
def test_the_condition_is_the_stores_own(
    s3: S3Server, remote: ObjectRemote, there: bytes | None
) -> None:
    """Somebody writes between the comparison and the write: the store refuses."""
    s3.delete("set/manifest.json")
    version = remote.replace("manifest.json", there, None) if there else None
    s3.faults += [None, Fault("call", act=lambda: s3.put("set/manifest.json", b"theirs"))]
    with pytest.raises(ChangedRemotely):
        remote.replace("manifest.json", b"mine", version)
    assert not s3.faults
    assert s3.get("set/manifest.json") == b"theirs"


def test_a_conditional_write_whose_answer_is_lost_has_succeeded(
    s3: S3Server, remote: ObjectRemote
) -> None:
    s3.delete("set/manifest.json")
    s3.faults += [None, Fault("lost")]
    version = remote.replace("manifest.json", b"mine", None)
    assert remote.replace("manifest.json", b"again", version)
    assert s3.get("set/manifest.json") == b"again"
