"""An object store as a fixture: moto's S3 server, and the objects under some-bucket/set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen_lora.shards.remote.objects import ObjectRemote, open_object_remote
from qwen_lora.shards.remote.retries import Patience
from tests.s3_server import BUCKET, S3Server, s3_stand_in

HASTE = Patience(attempts=5, first_wait_s=0.001, longest_wait_s=0.01, stall_s=0.4)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_stand_in() as server:
        yield server


@pytest.fixture(scope="module")
def remote(s3: S3Server) -> Iterator[ObjectRemote]:
    """The objects under some-bucket/set."""
    opened = open_object_remote(f"s3://{BUCKET}/set/", HASTE)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_fault_left(s3: S3Server) -> None:
    s3.faults.clear()
