"""Remote sets through the cache: what arrives is right, what is shared is fetched once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.shards import tools
from qwen_lora.shards.format import FileEntry
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError, never_stop
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.store import RemoteStore
from qwen_lora.shards.verify import verify

from .conftest import publish, sorted_samples, write_one
from .folder_remote import FolderRemote

PLENTY = 1 << 30


@pytest.fixture
def remote(shard_set: Path) -> FolderRemote:
    return FolderRemote(shard_set)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", PLENTY)


@pytest.fixture
def store(remote: FolderRemote, cache: ShardCache, tmp_path: Path) -> RemoteStore:
    return RemoteStore(remote, cache, tmp_path / "state")


def all_bytes(shards: ShardSet) -> list[tuple[bytes, bytes]]:
    return [tuple(bytes(part) for part in shards.read_bytes(row)) for row in range(len(shards))]


def tars(folder: Path) -> list[FileEntry]:
    return [entry.tar for entry in load_manifest(folder)[0].shards]


def copies(cache: ShardCache) -> list[Path]:
    return [path for path in cache.folder.glob("??/*") if not path.suffix]


def test_a_remote_set_reads_like_a_local_one(store: RemoteStore, shard_set: Path) -> None:
    with ShardSet.open(shard_set) as local, ShardSet.open(store) as shards:
        assert all_bytes(shards) == all_bytes(local)
        assert shards.generation == local.generation
        ours, theirs = shards.unconditional(), local.unconditional()
        assert all(one.equal(two) for one, two in zip(ours, theirs, strict=True))
    assert Counter(name for name, _ in store.remote.fetched).most_common(1)[0][1] == 1  # type: ignore[attr-defined]
    report = verify(store, deep=True)
    assert report.ok and report.samples == 9
    assert list(tools.list_samples(store)) == list(tools.list_samples(shard_set))


def test_an_interrupted_download_goes_on(store: RemoteStore, shard_set: Path) -> None:
    (tar, *_) = tars(shard_set)
    store.remote.faults[tar.name] = [lambda rest: rest[:1000]]  # type: ignore[attr-defined]
    with pytest.raises(RemoteError, match="connection was lost"):
        store.open(tar)
    assert copies(store.cache) == []
    with store.open(tar) as file:
        assert file.read() == (shard_set / tar.name).read_bytes()
    assert store.remote.fetched == [(tar.name, tar.bytes), (tar.name, tar.bytes - 1000)]  # type: ignore[attr-defined]


def test_wrong_bytes_are_fetched_again_then_refused(
    store: RemoteStore, remote: FolderRemote, shard_set: Path
) -> None:
    first, second, _ = tars(shard_set)
    remote.faults[first.name] = [lambda rest: bytes(len(rest))] * 2
    with store.open(first) as file:
        assert file.read() == (shard_set / first.name).read_bytes()
    remote.faults[second.name] = [lambda rest: bytes(len(rest))] * 3
    with pytest.raises(RemoteError, match="3 times sha256 .* arrived, the manifest says"):
        store.open(second)
    assert [path.name for path in copies(store.cache)] == [first.sha256]


def test_an_object_of_another_length_and_one_that_is_gone(
    store: RemoteStore, shard_set: Path
) -> None:
    first, second, _ = tars(shard_set)
    with open(shard_set / first.name, "ab") as file:
        file.write(b"more")
    with pytest.raises(RemoteError, match="another object arrived"):
        store.open(first)
    (shard_set / second.name).unlink()
    with pytest.raises(ShardError, match=f"{second.name} is missing"):
        store.open(second)
    assert copies(store.cache) == []


def test_a_copy_that_the_disk_damaged_is_fetched_again(
    store: RemoteStore, remote: FolderRemote, shard_set: Path
) -> None:
    with ShardSet.open(shard_set) as local:
        expected = all_bytes(local)
    with ShardSet.open(store) as shards:
        assert all_bytes(shards) == expected
        damaged = store.cache.folder
        for path in copies(ShardCache(damaged, PLENTY)):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)  # in place: open files see it
        before = len(remote.fetched)
        with ThreadPoolExecutor(4) as pool:
            again = list(pool.map(shards.read_bytes, range(len(shards))))
        assert [tuple(map(bytes, parts)) for parts in again] == expected
        assert len(remote.fetched) > before
    with ShardSet.open(RemoteStore(remote, store.cache)) as shards:  # sidecars too
        assert all_bytes(shards) == expected


def test_damage_at_the_far_side_is_an_error(
    store: RemoteStore, remote: FolderRemote, shard_set: Path
) -> None:
    tar = tars(shard_set)[0]
    path = shard_set / tar.name
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    with ShardSet.open(store) as shards, pytest.raises(RemoteError, match="remote copy is damaged"):
        all_bytes(shards)


def test_verify_checks_the_far_side_and_not_the_cache(store: RemoteStore, shard_set: Path) -> None:
    with ShardSet.open(store) as shards:
        all_bytes(shards)
        assert verify(store).ok
        for entry in (tars(shard_set)[0], load_manifest(shard_set)[0].shards[1].sidecar):
            path = shard_set / entry.name
            data = bytearray(path.read_bytes())
            data[700] ^= 1
            path.write_bytes(data)
        assert len(verify(store).problems) >= 2
        all_bytes(shards)


def test_the_least_recently_used_is_evicted_and_what_is_open_is_not(
    remote: FolderRemote, tmp_path: Path, shard_set: Path
) -> None:
    first, second, third = tars(shard_set)
    cache = ShardCache(tmp_path / "small", first.bytes + second.bytes)
    store = RemoteStore(remote, cache)
    store.open(first).close()
    store.open(second).close()
    (oldest,) = cache.folder.glob(f"??/{first.sha256}")
    os.utime(oldest, (1, 1))
    store.open(third).close()
    assert {path.name for path in copies(cache)} == {second.sha256, third.sha256}
    with store.open(first) as held:
        tight = RemoteStore(remote, ShardCache(cache.folder, 1))
        tight.open(third).close()
        tight.open(second).close()
        names = {path.name for path in copies(cache)}
        assert first.sha256 in names and third.sha256 not in names
        assert held.read() == (shard_set / first.name).read_bytes()
    assert not list(cache.folder.glob("??/*.lock"))


def test_threads_fetch_a_file_once(
    store: RemoteStore, remote: FolderRemote, shard_set: Path
) -> None:
    tar = tars(shard_set)[0]
    remote.may_go.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(store.open, tar) for _ in range(8)]
        while not remote.fetched:
            time.sleep(0.01)
        store.fetch_ahead(tar, never_stop)  # somebody does it already: no waiting
        remote.may_go.set()
        for future in waiting:
            with future.result() as file:
                assert len(file.read()) == tar.bytes
    assert remote.fetched == [(tar.name, tar.bytes)]


READER = """
import sys
from pathlib import Path
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.store import RemoteStore
from tests.shards.folder_remote import FolderRemote
remote = FolderRemote(Path(sys.argv[1]))
store = RemoteStore(remote, ShardCache(Path(sys.argv[2]), int(sys.argv[3])))
with ShardSet.open(store) as shards:
    for turn in range(5):
        for row in range(len(shards)):
            shards.read_bytes(row)
print(len(remote.fetched))
"""


@pytest.mark.parametrize("most_bytes", [PLENTY, 60_000])
def test_processes_share_a_cache(shard_set: Path, tmp_path: Path, most_bytes: int) -> None:
    """With a cache that is too small they evict each other's copies all the time."""
    command = [sys.executable, "-c", READER, shard_set, tmp_path / "cache", str(most_bytes)]
    readers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [(*reader.communicate(timeout=60), reader.returncode) for reader in readers]
    assert [(error, code) for _, error, code in results] == [("", 0)] * 3
    fetched = sum(int(out) for out, _, _ in results)
    if most_bytes == PLENTY:
        assert fetched == 6  # 3 shards, 3 sidecars
    assert not list((tmp_path / "cache").glob("??/*.part"))


def test_a_killed_download_leaves_its_bytes(shard_set: Path, tmp_path: Path) -> None:
    tar = tars(shard_set)[0]
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from qwen_lora.shards.remote.cache import ShardCache\n"
        "from qwen_lora.shards.format import FileEntry\n"
        f"entry = FileEntry({tar.name!r}, {tar.bytes}, {tar.sha256!r})\n"
        "def download(file):\n"
        "    file.write(b'x' * 700); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"ShardCache(Path({str(tmp_path / 'cache')!r}), {PLENTY}).get(\n"
        "    entry, download, lambda: None, 'it')\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    cache = ShardCache(tmp_path / "cache", PLENTY)
    assert copies(cache) == [] and cache.arrived(tar) == 700
    remote = FolderRemote(shard_set)
    with RemoteStore(remote, cache).open(tar) as file:  # the 700 were wrong: once more from 0
        assert file.read() == (shard_set / tar.name).read_bytes()
    assert remote.fetched == [(tar.name, tar.bytes - 700), (tar.name, tar.bytes)]


def test_closing_ends_a_wait(store: RemoteStore, remote: FolderRemote, shard_set: Path) -> None:
    tar = tars(shard_set)[0]
    remote.may_go.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(store.open, tar) for _ in range(2)]
        while not remote.fetched:
            time.sleep(0.01)
        with store.interrupted():
            for future in waiting:
                with pytest.raises(QwenLoraError, match="called off"):
                    future.result(timeout=10)
    remote.may_go.set()
    store.open(tar).close()
    store.close()
    with pytest.raises(QwenLoraError, match="called off"):
        store.open(tars(shard_set)[1])


def test_a_full_disk_is_said(remote: FolderRemote, tmp_path: Path, shard_set: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = RemoteStore(remote, ShardCache(tmp_path / "file" / "cache", PLENTY))
    with pytest.raises(QwenLoraError, match="cannot keep downloads in .*shard_cache_dir"):
        store.open(tars(shard_set)[0])


def test_waiting_is_said(
    store: RemoteStore,
    remote: FolderRemote,
    shard_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qwen_lora.shards.remote.store.SAY_SECONDS", 0.05)
    remote.may_go.clear()
    threading.Timer(0.5, remote.may_go.set).start()
    tar = tars(shard_set)[0]
    store.open(tar).close()
    assert f"waiting for test://set/{tar.name}: 0 of 0 MiB are here" in capsys.readouterr().err


def test_a_set_is_written_to_the_far_side(tmp_path: Path, cache: ShardCache) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    store = RemoteStore(FolderRemote(far), cache, tmp_path / "state")
    with pytest.raises(InputError, match="test://set holds no manifest"):
        load_manifest(store)
    samples = sorted_samples(6)
    for place in (store, near):
        publish(place, [write_one(place, samples[:3]), write_one(place, samples[3:])])
    ours = {path.name: path.read_bytes() for path in far.iterdir()}
    theirs = {path.name: path.read_bytes() for path in near.iterdir() if path.is_file()}
    assert ours == theirs
    assert list((tmp_path / "state").iterdir()) == []
    with ShardSet.open(near) as local, ShardSet.open(store) as shards:
        assert all_bytes(shards) == all_bytes(local)


def test_two_writers_of_one_manifest(remote: FolderRemote, cache: ShardCache) -> None:
    one, two = (RemoteStore(remote, cache) for _ in range(2))
    data = one.read("manifest.json", 1 << 20)
    assert two.read("manifest.json", 1 << 20) == data
    one.write("manifest.json", data + b" ")
    with pytest.raises(ChangedRemotely, match="somebody else"):
        two.write("manifest.json", data)
    one.write("manifest.json", data)
