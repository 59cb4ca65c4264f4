"""What is said of a set that cannot be used, and whether doing what it says helps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen_lora.errors import InputError, ShardError
from qwen_lora.shards import tools
from qwen_lora.shards.manifest import MANIFEST, load_manifest
from qwen_lora.shards.merge import merge
from qwen_lora.shards.prune import prune
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.store import FolderStore
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import write_retired

from .conftest import publish, sorted_samples, write_one


def two_generations(folder: Path) -> tuple[str, str]:
    """Names of the older, of 3 samples, and the newer, of 6 with one retired."""
    folder.mkdir()
    samples = sorted_samples(6)
    shards = [write_one(folder, samples[:3])]
    first = publish(folder, shards)
    retired = write_retired(folder, [samples[0].sample_id])
    shards.append(write_one(folder, samples[3:]))
    return first, publish(folder, shards, previous=first, retired=retired)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[", b"flip"])
def test_a_damaged_manifest_names_the_generation_to_restore_it_from(
    damage: bytes, tmp_path: Path
) -> None:
    _, newest = two_generations(tmp_path / "set")
    path = tmp_path / "set" / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"model", b"modem") if damage == b"flip" else damage)
    with pytest.raises(ShardError, match=f"; copy {newest} over it$"):
        ShardSet.open(tmp_path / "set")
    assert verify(tmp_path / "set").problems[0].endswith(f"; copy {newest} over it")
    shutil.copy(tmp_path / "set" / newest, path)
    assert verify(tmp_path / "set").problems == []


def test_a_damaged_generation_is_restored_from_the_manifest_or_pruned(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    first, newest = two_generations(folder)
    (folder / newest).write_bytes(b"{}")
    (problem,) = verify(folder).problems
    assert newest in problem and problem.endswith("; copy manifest.json over it")
    shutil.copy(folder / MANIFEST, folder / newest)
    (folder / first).write_bytes(b"{}")
    (problem,) = verify(folder).problems
    assert first in problem and "shards prune --unlisted" in problem
    prune(folder, unlisted=True)
    assert verify(folder).problems == []


def test_no_generation_that_follows_all_others_is_guessed(tmp_path: Path) -> None:
    two_generations(tmp_path / "set")
    publish(tmp_path / "set", [write_one(tmp_path / "set", sorted_samples(2, 50))])
    (tmp_path / "set" / MANIFEST).write_bytes(b"")
    with pytest.raises(ShardError, match="; copy it again from its source$"):
        load_manifest(tmp_path / "set")


def test_files_that_are_not_checked_are_told_in_a_line_each_kind(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    two_generations(folder)
    assert verify(folder).notes == []  # the older one needs nothing more
    prune(folder)
    (held,) = verify(folder).notes  # a shard, its sidecar, the retired list
    assert held.startswith("3 files belong to older generations alone and were not checked")
    write_one(folder, sorted_samples(1, 70))
    held, stray = verify(folder).notes
    assert stray.startswith("2 files belong to no generation (shard-")
    prune(folder, everything=True, unlisted=True)
    assert verify(folder).notes == []


def test_what_the_system_refuses_is_one_line_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind root, so the system's answer is made up."""
    folder = tmp_path / "set"
    two_generations(folder)
    real = Path.stat

    def refuse(suffix: str) -> None:
        def stat(self: Path, **options: bool) -> object:
            if self.name.endswith(suffix):
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, **options)

        monkeypatch.setattr(Path, "stat", stat)

    for suffix in (MANIFEST, ".tar"):
        refuse(suffix)
        with pytest.raises(ShardError, match=f"{suffix} cannot be read: Permission denied"):
            ShardSet.open(folder)
        problem = verify(folder).problems[0]
        assert problem.startswith(str(folder)) and "cannot be read: Permission denied" in problem


def test_a_disk_that_fails_while_a_member_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_generations(tmp_path / "set")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with ShardSet.open(tmp_path / "set") as shards:
        monkeypatch.setattr("qwen_lora.shards.reader._read_at", fail)
        with pytest.raises(ShardError, match=r"shard-.*sample .* cannot be read: Input/output"):
            shards.read_meta(0)


@pytest.mark.parametrize("use", [tools.info, verify, prune, ShardSet.open])
def test_places_that_are_no_set(
    use: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two_generations(tmp_path / "set")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for place, said in {
        "file": "no shard set at file: a set is a folder|file is a file",
        "set/manifest.json": "no shard set at|is a file",
        "folder": "no manifest .*so it is no shard set: name the folder",
        "": "the name of the shard set is empty",  # not the folder that we are in
        "s3:/bucket/set": "a URL has two slashes",
    }.items():
        with pytest.raises(InputError, match=said):
            use(place)  # type: ignore[operator]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "set"]
    monkeypatch.chdir(tmp_path / "set")
    with pytest.raises(InputError):
        use("")  # type: ignore[operator]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_the_merged_set_should_be(place: str, tmp_path: Path) -> None:
    two_generations(tmp_path / "set")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InputError, match="is a file"):
        merge([tmp_path / "set"], tmp_path / place)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_folder_store_is_asked_before_anything_is_made(tmp_path: Path) -> None:
    FolderStore(tmp_path / "new" / "set").check_writable()
    assert not (tmp_path / "new").exists()
