"""Writing to a remote set: two machines at once, disks that refuse, uploads that fail."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_lora.errors import QwenLoraError
from qwen_lora.precompute import write
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError, never_stop
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.store import RemoteStore
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import write_shard

from .conftest import FINGERPRINT, publish, sorted_samples, write_one
from .folder_remote import FolderRemote


@pytest.fixture
def remote(shard_set: Path) -> FolderRemote:
    return FolderRemote(shard_set)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30)


def test_a_manifest_that_is_gone_is_written_anew(remote: FolderRemote, cache: ShardCache) -> None:
    store = RemoteStore(remote, cache)
    data = store.read("manifest.json", 1 << 20)
    remote.delete("manifest.json")
    with pytest.raises(ChangedRemotely):
        store.write("manifest.json", data)
    with pytest.raises(FileNotFoundError):
        store.read("manifest.json", 1 << 20)
    store.write("manifest.json", data)


class TwoMachines(FolderRemote):
    """Right before a sidecar gets its name, another machine's is there."""

    theirs = b""

    def replace(self, name: str, data: bytes, version: str | None) -> str | None:
        if name.startswith("shard-") and self.theirs:
            (self.folder / name).write_bytes(self.theirs)
        return super().replace(name, data, version)


def test_two_machines_publish_one_shard(tmp_path: Path, cache: ShardCache) -> None:
    """Their library versions stand in the sidecars; whoever comes second lists the first's."""
    samples, other = sorted_samples(2), tmp_path / "other"
    (tmp_path / "far").mkdir()
    other.mkdir()
    theirs = write_shard(other, samples, FINGERPRINT, {"qwen_lora": "another"})
    remote = TwoMachines(tmp_path / "far")
    remote.theirs = (other / theirs.sidecar.name).read_bytes()
    store = RemoteStore(remote, cache, tmp_path / "state")
    assert write_one(store, samples) == theirs
    publish(store, [theirs])
    assert verify(tmp_path / "far", deep=True).problems == []
    remote.theirs = b"{}"  # what nobody could read is replaced
    store.read("manifest.json", 1 << 20)
    publish(store, [write_one(store, sorted_samples(2, 7))])
    assert verify(tmp_path / "far", deep=True).problems == []


def test_what_was_written_is_kept_where_there_is_room(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State and cache may lie on two disks; a copy that the disk refuses is no error."""
    entry = load_manifest(shard_set)[0].shards[0].tar
    replace = os.replace
    kept: list[list[bytes]] = []

    def two_disks(source: Path, target: Path) -> None:
        if "state" in str(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    def add(name: str) -> None:
        source = tmp_path / f"state-{name}"
        source.write_bytes((shard_set / entry.name).read_bytes())
        cache = ShardCache(tmp_path / name, 1 << 30)
        store = RemoteStore(FolderRemote(tmp_path / "far"), cache, tmp_path)
        store.publish(source, entry)
        assert not source.exists()
        kept.append([path.read_bytes() for path in cache.folder.glob("??/*")])

    (tmp_path / "far").mkdir()
    whole = [(shard_set / entry.name).read_bytes()]
    add("one")
    monkeypatch.setattr("qwen_lora.shards.remote.cache.os.replace", two_disks)
    add("two")
    monkeypatch.setattr("qwen_lora.shards.remote.cache.LEFT_FREE_BYTES", 1 << 62)
    add("three")
    (tmp_path / "four").write_text("a file in the folder's place")
    add("four")
    assert kept == [whole, whole, [], []]


def test_a_failed_upload_leaves_no_temporary(
    remote: FolderRemote, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RemoteError("access denied")

    monkeypatch.setattr(remote, "put", refuse)
    store = RemoteStore(remote, cache, tmp_path / "state")
    with pytest.raises(RemoteError, match="access denied"):
        write_one(store, sorted_samples(2, 20))
    assert list((tmp_path / "state").iterdir()) == []


class Stuck(FolderRemote):
    """An upload that gets nowhere."""

    def put(
        self,
        name: str,
        source: Path | bytes,
        check: Callable[[], None] = never_stop,
        resumed: bool = False,
    ) -> None:
        while True:
            check()
            time.sleep(0.01)


def test_a_stopped_run_does_not_wait_for_a_stuck_upload(
    shard_set: Path, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "FINISH_S", 0.1)
    store = RemoteStore(Stuck(shard_set), cache, tmp_path / "state")
    with (
        pytest.raises(KeyboardInterrupt),
        write.BackgroundWriter(store, FINGERPRINT, {"qwen_lora": "test"}) as writer,
    ):
        writer.submit(sorted_samples(2, 20))
        raise KeyboardInterrupt
    assert list((tmp_path / "state").iterdir()) == []


def test_a_full_disk_is_the_state_folders(
    remote: FolderRemote, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qwen_lora.shards.writer.temporary_file", full)
    store = RemoteStore(remote, cache, tmp_path / "state")
    with write.BackgroundWriter(store, FINGERPRINT, {"qwen_lora": "test"}) as writer:
        writer.submit(sorted_samples(2, 20))
        with pytest.raises(QwenLoraError, match=f"cannot write to {tmp_path}/state: No space left"):
            writer.finish()
