"""Retired samples and old generations leave; what stays is the same, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_lora.errors import InputError, ShardError
from qwen_lora.posix import exclusive_lock
from qwen_lora.shards import tools
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.prune import prune
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.store import RemoteStore
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import write_retired

from .conftest import publish, sorted_samples, write_one
from .folder_remote import FolderRemote
from .test_merge import KILL_POINTS, files, members, plain

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def grown_set(folder: Path) -> tuple[Path, list[str]]:
    """Three generations: 6 samples in 3 shards, then 4 in a shard more, then 3 retired ones, among
    them all of one shard. Also the names of the generations, the newest first."""
    folder.mkdir()
    samples = sorted_samples(10)
    shards = [write_one(folder, samples[start : start + 2]) for start in (0, 2, 4)]
    first = publish(folder, shards)
    shards.append(write_one(folder, samples[6:]))
    second = publish(folder, shards, previous=first)
    gone = [samples[number].sample_id for number in (2, 3, 7)]
    third = publish(folder, shards, previous=second, retired=write_retired(folder, gone))
    return folder, [third, second, first]


def test_retired_samples_are_compacted_out(tmp_path: Path) -> None:
    folder, (third, second, first) = grown_set(tmp_path / "set")
    live, before = members(folder), files(folder)
    report = prune(folder)
    manifest, newest = load_manifest(folder)
    assert report.kept_generations == [newest, third]
    assert report.removed_generations == [first, second]
    assert manifest.previous == third
    assert (manifest.retired, manifest.counts["retired"]) == (None, 0)
    assert (report.retired, report.shards_rewritten) == (3, 2)
    assert members(folder) == plain(folder) == live
    assert verify(folder, deep=True).problems == []
    with ShardSet.open(folder, generation=third) as shards:  # what a run is pinned to is whole
        assert len(shards) == 7
        for row in range(len(shards)):
            shards.read(row)
    assert any("--all removes it" in line and "3 retired" in line for line in report.lines())
    again = prune(folder)
    assert (again.retired, again.removed_files, again.generation) == (0, [], newest)

    report = prune(folder, everything=True)
    assert report.kept_generations == [newest]
    after = files(folder)
    shards_left = {name for name in after if name.startswith("shard-")}
    listed = {f.name for entry in manifest.shards for f in (entry.tar, entry.sidecar)}
    assert shards_left == listed
    assert set(after) - {"manifest.json"} >= shards_left
    assert [name for name in after if name.startswith("manifest-")] == [newest]
    assert members(folder) == plain(folder) == live
    whole = after.keys() & before.keys()
    assert {name for name in whole if name.endswith(".tar")}  # untouched shards are not rewritten
    assert not list((folder / ".local").glob("*.tmp"))


def test_info_tells_of_the_generations(tmp_path: Path) -> None:
    folder, (third, second, first) = grown_set(tmp_path / "set")
    facts = tools.info(folder)
    assert [each["name"] for each in facts["generations"]] == [third, second, first]
    assert [each["samples"] for each in facts["generations"]] == [7, 10, 6]
    assert [each["retired"] for each in facts["generations"]] == [3, 0, 0]
    on_disk = files(folder)
    data = sum(len(on_disk[name]) for name in on_disk if not name.startswith("manifest"))
    assert facts["generations"][0]["bytes"] == data
    told = tools.format_info(facts)
    assert "generations  3" in told
    assert f"  {second}  10 samples, 0 retired" in told
    (folder / second).write_bytes(b"{}")  # nothing older can be told from a damaged one
    assert len(tools.info(folder)["generations"]) == 1
    json.dumps(facts)


def test_dry_run_tells_what_would_be_freed(tmp_path: Path) -> None:
    folder, _ = grown_set(tmp_path / "set")
    before = files(folder)
    told = prune(folder, everything=True, dry_run=True)
    assert files(folder) == before
    assert not (folder / ".local" / "lock").exists()
    done = prune(folder, everything=True)
    assert told.removed_files == done.removed_files
    assert told.bytes_freed == done.bytes_freed
    gone = before.keys() - files(folder).keys()
    assert gone == set(done.removed_files)
    assert done.bytes_freed == sum(len(before[name]) for name in gone)
    assert (told.retired, told.bytes_written) == (done.retired, done.bytes_written)


def test_unlisted_files_go_only_when_asked_for(tmp_path: Path) -> None:
    folder, _ = grown_set(tmp_path / "set")
    stopped = write_one(folder, sorted_samples(2, 20))  # a stopped precompute's
    (folder / "shard-notes.txt").write_text("mine")
    (folder / "manifest-0123456789ab.json").write_text("{}")
    report = prune(folder, everything=True)
    assert report.unlisted == 3
    assert (folder / stopped.tar.name).exists()
    report = prune(folder, unlisted=True)
    assert sorted(report.removed_files) == sorted(
        [stopped.tar.name, stopped.sidecar.name, "manifest-0123456789ab.json"]
    )
    assert report.bytes_freed == stopped.tar.bytes + stopped.sidecar.bytes + 2
    assert (folder / "shard-notes.txt").exists()
    assert verify(folder).problems == []


def test_a_set_of_retired_samples_alone_becomes_empty(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    samples = sorted_samples(2)
    retired = write_retired(folder, [sample.sample_id for sample in samples])
    publish(folder, [write_one(folder, samples)], retired=retired)
    prune(folder, everything=True)
    assert not list(folder.glob("shard-*"))
    assert verify(folder).problems == []
    assert members(folder) == {}


def test_a_damaged_record_stops_it_before_anything_is_removed(tmp_path: Path) -> None:
    folder, _ = grown_set(tmp_path / "set")
    with ShardSet.open(folder) as shards:
        large = next(e.tar for e in shards.manifest.shards if e.samples == 4)
        row = next(row for row in range(len(shards)) if shards.tar_of(row) == large)
        tar, offset = shards.tar_of(row).name, int(shards.table.member_offsets[row, 1])
    data = bytearray((folder / tar).read_bytes())
    data[offset + 100] ^= 1
    (folder / tar).write_bytes(data)
    before = files(folder)
    with pytest.raises(ShardError, match="damaged"):
        prune(folder, everything=True)
    assert before.items() <= files(folder).items()


def test_it_takes_the_lock(tmp_path: Path) -> None:
    folder, _ = grown_set(tmp_path / "set")
    lock = exclusive_lock(folder / ".local" / "lock", "it")
    with lock, pytest.raises(InputError, match="in use"):
        prune(folder)
    with pytest.raises(InputError, match="no shard set"):
        prune(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


class ReadOnly(FolderRemote):
    """A web server."""

    delete = FolderRemote.__mro__[1].delete  # type: ignore[assignment]


class Nameless(FolderRemote):
    """Objects that cannot be listed."""

    def names(self) -> list[str] | None:
        return None


def remote(kind: type[FolderRemote], folder: Path, tmp_path: Path) -> RemoteStore:
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    return RemoteStore(kind(folder), cache, tmp_path / "state")


def test_a_remote_set_is_pruned_where_it_can_be_written(tmp_path: Path) -> None:
    folder, _ = grown_set(tmp_path / "set")
    live, before = members(folder), files(folder)
    with pytest.raises(InputError, match="can only be read"):
        prune(remote(ReadOnly, folder, tmp_path))
    with pytest.raises(InputError, match="cannot be listed"):
        prune(remote(Nameless, folder, tmp_path), unlisted=True)
    assert files(folder) == before
    report = prune(remote(FolderRemote, folder, tmp_path), everything=True)
    assert report.retired == 3
    assert members(folder) == live
    assert verify(folder).problems == []
    assert not list((folder / ".local").iterdir())


def test_killed_prunes_keep_what_they_keep(tmp_path: Path) -> None:
    grown_set(tmp_path / "old")
    result = subprocess.run(
        [sys.executable, KILL_POINTS, "prune", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20
