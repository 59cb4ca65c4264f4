"""Shard sets over HTTP: what servers and networks do, against plain files."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote import open_remote
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.http import HttpRemote
from qwen_lora.shards.remote.retries import Patience
from qwen_lora.shards.remote.store import RemoteStore

from .conftest import write_set
from .fault_server import FaultServer, random_script, serve

QUICK = Patience(attempts=7, first_wait_s=0.001, longest_wait_s=0.002)
PLENTY = 1 << 30


@pytest.fixture
def big(tmp_path: Path) -> bytes:
    data = random.Random(0).randbytes(300_000)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "big.bin").write_bytes(data)
    return data


@pytest.fixture
def server(tmp_path: Path, big: bytes) -> Iterator[FaultServer]:
    with serve(tmp_path / "served") as running:
        yield running


@pytest.fixture
def remote(server: FaultServer) -> Iterator[HttpRemote]:
    opened = HttpRemote(server.url, patience=QUICK)
    yield opened
    opened.close()


def fetched(remote: HttpRemote, size: int, name: str = "big.bin") -> bytes:
    file = io.BytesIO()
    remote.fetch(name, size, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "script",
    [
        [],
        ["503", "429", "500", "reset"],
        ["cut", "cut", "cut"],
        ["cut", "no-range"],
        ["cut", "wrong-range"],
        ["cut-silently", "cut-silently"],
        ["chunked"],
        ["weak-etag", "cut", "weak-etag"],
        ["no-etag", "cut", "no-etag"],
    ],
    ids=lambda script: "+".join(script) or "fine",
)
def test_what_passes_is_not_noticed(
    remote: HttpRemote, server: FaultServer, big: bytes, script: list[str]
) -> None:
    server.script = list(script)
    assert fetched(remote, len(big)) == big


def test_a_broken_transfer_goes_on_where_it_broke(
    remote: HttpRemote, server: FaultServer, big: bytes
) -> None:
    server.script = ["cut"]
    assert fetched(remote, len(big)) == big
    (_, first), (_, second) = server.log
    assert "range" not in first and first["accept-encoding"] == "identity"
    assert second["range"] == f"bytes={len(big) // 2}-" and second["if-range"] == '"v1"'


def test_small_files_are_read_whole(remote: HttpRemote, server: FaultServer, big: bytes) -> None:
    server.script = ["reset", "cut", "503"]
    assert remote.read("big.bin", len(big)) == (big, '"v1"')
    server.script = ["chunked"]
    assert remote.read("big.bin", len(big))[0] == big
    with pytest.raises(RemoteError, match="more than the 1000 bytes"):
        remote.read("big.bin", 1000)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (["404"], FileNotFoundError, "big.bin"),
        (["403"], RemoteError, r"access denied \(HTTP 403\)"),
        (["html"], RemoteError, "a web page came in place of the file"),
        (["gzip"], RemoteError, "encoded as 'gzip', which was not asked for"),
        (["cut", "changed"], ChangedRemotely, "is another object than before"),
        (["503"] * 7, RemoteError, "HTTP 503; given up after 7 attempts"),
        (["reset"] * 7, RemoteError, "no answer .*; given up after 7 attempts"),
        (["to-ftp"], RemoteError, "redirects to ftp://elsewhere/x"),
        (["redirect"] * 6, RemoteError, "more than 5 redirects"),
    ],
    ids=lambda value: "+".join(value[:2]) if isinstance(value, list) else None,
)
def test_what_does_not_pass_is_one_clear_error(
    remote: HttpRemote,
    server: FaultServer,
    big: bytes,
    script: list[str],
    error: type[Exception],
    message: str,
) -> None:
    server.redirect_to = server.url
    server.script = list(script)
    with pytest.raises(error, match=message):
        fetched(remote, len(big))
    if error is not ChangedRemotely:  # a small file is simply read again
        server.script = list(script)
        with pytest.raises(error, match=message):
            remote.read("big.bin", len(big))


def test_another_length_is_another_object(remote: HttpRemote, big: bytes) -> None:
    for size in (len(big) - 1, len(big) + 1):
        with pytest.raises(ChangedRemotely):
            fetched(remote, size)


def test_credentials_stay_with_their_host(server: FaultServer, tmp_path: Path, big: bytes) -> None:
    headers = {"Authorization": "Bearer canary-5f3a", "X-Api-Key": "canary-5f3a"}
    with serve(tmp_path / "served") as elsewhere:
        remote = HttpRemote(server.url, headers=headers, patience=QUICK)
        server.script, server.redirect_to = ["redirect"], elsewhere.url
        assert fetched(remote, len(big)) == big
        remote.close()
        assert server.log[0][1]["authorization"] == "Bearer canary-5f3a"
        ((_, seen),) = elsewhere.log
    assert "canary" not in str(seen)


def test_waiting_can_be_called_off(server: FaultServer, big: bytes) -> None:
    remote = HttpRemote(server.url, patience=Patience(7, 60.0, 60.0))
    server.script = ["503"]
    asked: list[float] = []

    def check() -> None:
        asked.append(time.monotonic())
        if len(asked) > 3:
            raise QwenLoraError("enough")

    with pytest.raises(QwenLoraError, match="enough"):
        remote.fetch("big.bin", len(big), io.BytesIO(), check)
    remote.close()


@pytest.mark.parametrize(
    "url",
    ["https://me:pw@host/set", "https://host/set?token=x", "https://host/set#x", "https:///x"],
)
def test_odd_addresses(url: str) -> None:
    with pytest.raises(InputError) as caught:
        open_remote(url)
    assert "pw" not in str(caught.value) and "token=x" not in str(caught.value)


def test_no_server_at_all(big: bytes, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url
    remote = HttpRemote(url, patience=QUICK)
    with pytest.raises(RemoteError, match="no answer .ConnectError.; given up"):
        remote.read("manifest.json", 100)
    remote.close()


def open_set(server: FaultServer, cache: Path) -> ShardSet:
    store = RemoteStore(HttpRemote(server.url, patience=QUICK), ShardCache(cache, PLENTY))
    try:
        return ShardSet.open(store)
    except BaseException:
        store.close()
        raise


def run_sequence(server: FaultServer, expected: list[bytes], cache: Path, seed: int) -> str:
    """Open a set through scripted faults and read all of it: `same`, or the error."""
    server.script, server.etag = random_script(random.Random(seed)), "v1"
    try:
        opened = open_set(server, cache)
    except QwenLoraError as error:
        return str(error)
    with opened as shards:
        try:
            found = [bytes(b"".join(shards.read_bytes(row))) for row in range(len(shards))]
        except QwenLoraError as error:
            return str(error)
        finally:
            server.script = []
    assert found == expected, f"seed {seed}: other bytes than were served"
    return "same"


@pytest.mark.parametrize(
    "count", [40, pytest.param(500, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_random_fault_sequences(tmp_path: Path, count: int) -> None:
    """Identical bytes, or one clear error; never other bytes."""
    folder = write_set(tmp_path / "set", 6, per_shard=2)
    with ShardSet.open(folder) as local:
        expected = [bytes(b"".join(local.read_bytes(row))) for row in range(len(local))]
    outcomes: list[str] = []
    with serve(folder) as server:
        for seed in range(count):
            outcome = run_sequence(server, expected, tmp_path / f"cache-{seed}", seed)
            assert "\n" not in outcome, f"seed {seed}: {outcome}"
            outcomes.append(outcome)
    same = outcomes.count("same")
    print(f"{count} sequences: {same} identical, {count - same} errors, 0 wrong bytes")
    assert same >= count // 2


def test_nothing_at_the_address(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as server:
        with pytest.raises(InputError, match=f"{server.url} holds no manifest"):
            open_set(server, tmp_path / "cache")


def test_a_pruned_shard_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with serve(folder) as server, open_set(server, tmp_path / "cache") as shards:
        tar = shards.tar_of(0).name
        (folder / tar).unlink()
        with pytest.raises(ShardError, match=f"{server.url}/{tar} is missing"):
            shards.read(0)
