"""Object stores against moto's S3 server: requests, URLs, faults on the way."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.format import FileEntry
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.objects import ObjectRemote, open_object_remote
from qwen_lora.shards.remote.store import RemoteStore
from tests.s3_server import BUCKET, SECRET, Fault, S3Server
from tests.shards.conftest import write_set
from tests.shards.object_store import HASTE, no_fault_left, remote, s3

__all__ = ["no_fault_left", "remote", "s3"]

RATES = (0.2, 0.4, 0.7)  # of faults among the requests of a sequence
STATUSES = (429, 500, 502, 503, 504)


# ---- reading -------------------------------------------------------------------------------------


def test_reads_a_whole_object_and_its_version(s3: S3Server, remote: ObjectRemote) -> None:
    s3.put("set/a.json", b"some content")
    data, version = remote.read("a.json", 100)
    assert data == b"some content"
    s3.put("set/a.json", b"another")
    assert remote.read("a.json", 100)[1] != version


def test_an_object_that_is_not_there(s3: S3Server, remote: ObjectRemote) -> None:
    with pytest.raises(FileNotFoundError):
        remote.read("nothing.json", 100)
    with pytest.raises(FileNotFoundError):
        remote.fetch("nothing.json", 10, io.BytesIO())
    remote.delete("nothing.json")


def test_an_object_longer_than_it_can_be_is_not_read(s3: S3Server, remote: ObjectRemote) -> None:
    s3.put("set/long.json", b"x" * 2000)
    with pytest.raises(RemoteError, match="2000 bytes are more than it can have"):
        remote.read("long.json", 1999)


def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    other = open_object_remote("s3://another-bucket/set", HASTE)
    with pytest.raises(InputError, match=r"s3://another-bucket/set/a: there is no such bucket"):
        other.read("a", 10)
    other.close()


def test_a_fetch_goes_on_where_the_last_one_ended(s3: S3Server, remote: ObjectRemote) -> None:
    content = random.Random(1).randbytes(3_000_000)
    s3.put("set/shard.tar", content)
    file = io.BytesIO()
    file.write(content[:1_234_567])
    del s3.requests[:]
    remote.fetch("shard.tar", len(content), file)
    assert file.getvalue() == content
    assert len(s3.requests) == 1
    remote.fetch("shard.tar", len(content), file)  # there is nothing left to do
    assert len(s3.requests) == 1


@pytest.mark.parametrize("kind", ["reset", "cut", "status", "stall"])
def test_passing_faults_are_not_seen(s3: S3Server, remote: ObjectRemote, kind: str) -> None:
    content = random.Random(kind).randbytes(2_000_000)
    s3.put("set/shard.tar", content)
    for start in (0, 700_001):
        s3.faults += [Fault(kind, status, seconds=0.7) for status in (503, 500)]
        file = io.BytesIO()
        file.write(content[:start])
        remote.fetch("shard.tar", len(content), file)
        assert file.getvalue() == content
        assert not s3.faults


def test_a_store_that_stays_down_is_given_up(s3: S3Server, remote: ObjectRemote) -> None:
    s3.put("set/a.json", b"x")
    s3.faults += [Fault("status", 503)] * HASTE.attempts
    with pytest.raises(RemoteError, match=r"503 SlowDown; given up after 5 attempts"):
        remote.read("a.json", 10)
    assert not s3.faults


def test_an_object_that_changes_during_its_fetch_is_noticed(
    s3: S3Server, remote: ObjectRemote
) -> None:
    first, second = (random.Random(seed).randbytes(1_500_000) for seed in (1, 2))
    s3.put("set/shard.tar", first)
    s3.faults += [
        Fault("cut", 700_000),
        Fault("call", act=lambda: s3.put("set/shard.tar", second)),
    ]
    with pytest.raises(ChangedRemotely):
        remote.fetch("shard.tar", len(first), io.BytesIO())
    with pytest.raises(ChangedRemotely, match="1500000 bytes, 1499999 are expected"):
        remote.fetch("shard.tar", len(first) - 1, io.BytesIO())


def test_names_lists_objects_of_this_folder_only(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # of one page
    for number in range(25):
        s3.put(f"listing/{number:04d}", b"")
    s3.put("listing/.local/lock", b"")
    s3.put("listing2/other", b"")
    opened = open_object_remote(f"s3://{BUCKET}/listing", HASTE)
    assert opened.names() == [f"{number:04d}" for number in range(25)]
    assert len([each for each in s3.requests if "list-type" in each]) >= 3
    opened.close()


def test_checks_are_called_and_end_a_transfer(s3: S3Server, remote: ObjectRemote) -> None:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    s3.put("set/shard.tar", b"x" * 100)
    with pytest.raises(Enough):
        remote.fetch("shard.tar", 100, io.BytesIO(), stop)
    with pytest.raises(Enough):
        remote.read("shard.tar", 100, stop)


# ---- URLs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://AKIAIOSFODNN7EXAMPLE:hunter2hunter2@bucket/set", "does not belong into a URL"),
        ("s3:///set", "names no bucket"),
        ("s3://bucket/set?versionId=1", "no part after"),
        ("nosuch://bucket/set", "Protocol not known"),
    ],
)
def test_urls_that_cannot_be_opened(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_object_remote(url)
    assert "hunter2" not in str(caught.value)


def test_no_secret_in_messages(s3: S3Server, remote: ObjectRemote) -> None:
    s3.faults += [Fault("status", 403), Fault("status", 400), *[Fault("reset")] * 20]
    for _ in range(3):
        with pytest.raises(QwenLoraError) as caught:
            remote.read("a.json", 10)
        text = repr(caught.value) + repr(caught.value.__cause__)
        assert SECRET not in text and "AKIA" not in text


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_protocols_of_fsspec(tmp_path: Path, protocol: str) -> None:
    remote = open_object_remote(f"{protocol}://{tmp_path}/other", HASTE)
    source = tmp_path / "source"
    content = random.Random(3).randbytes(9 << 20)  # more than one request reads
    source.write_bytes(content)
    assert remote.names() == []
    remote.put("a.tar", source)
    remote.put("b.json", b"{}")
    assert remote.names() == ["a.tar", "b.json"]
    file = io.BytesIO()
    file.write(content[:1000])
    remote.fetch("a.tar", len(content), file)
    assert file.getvalue() == content
    version = remote.replace("manifest.json", b"one", None)
    with pytest.raises(ChangedRemotely):
        remote.replace("manifest.json", b"two", None)
    remote.replace("manifest.json", b"three", version)
    assert remote.read("manifest.json", 5)[0] == b"three"
    remote.delete("a.tar")
    remote.delete("a.tar")
    with pytest.raises(FileNotFoundError):
        remote.fetch("a.tar", len(content), io.BytesIO())


# ---- sequences of faults -------------------------------------------------------------------------


def random_fault(rng: random.Random, s3: S3Server, key: str, content: bytes) -> Fault:
    """A change of an object under way is put right now and then."""
    kind = rng.choices(
        ["reset", "lost", "status", "cut", "flip", "change", "restore", "stall"],
        [18, 12, 24, 24, 6, 4, 6, 0.4],
    )[0]
    if kind == "status":
        return Fault(kind, rng.choice(STATUSES))
    if kind == "change":
        other = rng.randbytes(len(content) - rng.randrange(2))
        return Fault("call", act=lambda: s3.put(key, other))
    if kind == "restore":
        return Fault("call", act=lambda: s3.put(key, content))
    return Fault(kind, rng.randrange(1 << 30), seconds=0.7)


def read_under_faults(
    s3: S3Server, remote: ObjectRemote, local: Path, seed: str, cache: Path
) -> bool:
    """Read a whole set; True when all came, False for one clear error. Wrong bytes fail."""
    rng = random.Random(seed)
    files = {path.name: path.read_bytes() for path in local.iterdir() if path.is_file()}
    for name, content in files.items():
        s3.put(f"set/{name}", content)
    name = rng.choice(sorted(files))
    rate = rng.choice(RATES)
    planned = [random_fault(rng, s3, f"set/{name}", files[name]) for _ in range(60)]
    s3.faults += [fault if rng.random() < rate else None for fault in planned]
    try:
        with ShardSet.open(local) as expected:
            store = RemoteStore(remote, ShardCache(cache, 1 << 30))
            shards = ShardSet.of_manifest(store, *load_manifest(store))
            try:
                assert len(shards) == len(expected), seed
                for row in range(len(expected)):
                    assert shards.read_bytes(row) == expected.read_bytes(row), seed
            finally:
                shards._files.close()  # the store goes on
        return True
    except QwenLoraError as error:
        assert "\n" not in str(error) and str(error), seed
        return False
    finally:
        s3.faults.clear()


def write_under_faults(s3: S3Server, remote: ObjectRemote, seed: str, folder: Path) -> bool:
    """Publish a file and replace an object; both are there whole, or as they were."""
    rng = random.Random(seed)
    content, old, new = (rng.randbytes(rng.randrange(1, 200_000)) for _ in range(3))
    for key in ("set/put.tar", "set/manifest.json"):
        s3.delete(key)
    s3.put("set/manifest.json", old)
    source = folder / "source"
    source.write_bytes(content)
    _, version = remote.read("manifest.json", 1 << 20)
    planned = [random_fault(rng, s3, "set/unrelated", b"xx") for _ in range(30)]
    # A write has no hash with which a store could tell that it was changed on its way back.
    rate = rng.choice(RATES)
    s3.faults += [
        fault if fault.kind != "flip" and rng.random() < rate else None for fault in planned
    ]
    done = 0
    try:
        remote.put("put.tar", source)
        done = 1
        remote.replace("manifest.json", new, version)
        done = 2
    except QwenLoraError as error:
        assert "\n" not in str(error) and str(error), seed
    finally:
        s3.faults.clear()
    assert s3.get("set/put.tar") in ([content] if done else [None, content]), seed
    assert s3.get("set/manifest.json") in ([new] if done == 2 else [old, new]), seed
    return done == 2


def run_sequences(
    s3: S3Server, remote: ObjectRemote, tmp_path: Path, first: int, count: int
) -> None:
    local = write_set(tmp_path / "local", count=7, per_shard=4)
    good = 0
    for number in range(first, first + count):
        seed, folder = f"sequence {number}", tmp_path / str(number)
        folder.mkdir()
        if number % 3:
            good += read_under_faults(s3, remote, local, seed, folder)
        else:
            good += write_under_faults(s3, remote, seed, folder)
    print(f"{good} of {count} sequences ended with every byte, the others with one error")
    assert 0.3 * count < good < count  # the faults bite, and are mostly got over


def test_fault_sequences(
    s3: S3Server, remote: ObjectRemote, tmp_path: Path, fault_seed: int
) -> None:
    run_sequences(s3, remote, tmp_path, fault_seed, 40)


@pytest.mark.slow
def test_many_fault_sequences(
    s3: S3Server, remote: ObjectRemote, tmp_path: Path, fault_seed: int
) -> None:
    run_sequences(s3, remote, tmp_path, fault_seed, 500)


def test_a_flipped_bit_is_fetched_again(s3: S3Server, remote: ObjectRemote, tmp_path: Path) -> None:
    import hashlib

    content = random.Random(8).randbytes(50_000)
    s3.put("set/shard.tar", content)
    store = RemoteStore(remote, ShardCache(tmp_path / "cache", 1 << 30), tmp_path / "state")
    s3.faults.append(Fault("flip", 12_345))
    with store.open(FileEntry("shard.tar", len(content), hashlib.sha256(content).hexdigest())) as f:
        assert f.read() == content
