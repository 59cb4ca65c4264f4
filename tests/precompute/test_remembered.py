import os
from pathlib import Path

from qwen_lora.precompute.remembered import RememberedFailures, RememberedSources
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, Skip

RULES = {"max_pixels": 5}


def candidate(path: Path) -> Candidate:
    return Candidate(ImageSource(path.name, path), ("a caption",))


def old_file(path: Path, data: bytes = b"abc") -> Path:
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


def remember(sources: RememberedSources, each: Candidate) -> None:
    sources.remember(Inspection(each, "hash", (3, 4)), sources.identity(each.image))


def test_a_source_is_remembered_until_it_or_the_rules_change(tmp_path):
    file = tmp_path / "sources.json"
    each = candidate(old_file(tmp_path / "a.png"))
    sources = RememberedSources(file, RULES)
    assert sources.find(each) is None
    remember(sources, each)
    sources.save()
    assert RememberedSources(file, RULES).find(each) == Inspection(each, "hash", (3, 4))
    assert RememberedSources(file, {"max_pixels": 6}).find(each) is None
    os.utime(each.image.path, ns=(10**18, 10**18 + 1))
    assert RememberedSources(file, RULES).find(each) is None


def test_another_length_or_inode_tells_a_change_when_the_time_does_not(tmp_path):
    file = tmp_path / "sources.json"
    one, two = (candidate(old_file(tmp_path / name)) for name in ("a.png", "b.png"))
    sources = RememberedSources(file, RULES)
    remember(sources, one)
    remember(sources, two)
    sources.save()
    assert RememberedSources(file, RULES).find(one) is not None
    (tmp_path / "a.png").rename(tmp_path / "other")  # swapped by name, equal in length and time
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    (tmp_path / "other").rename(tmp_path / "b.png")
    assert RememberedSources(file, RULES).find(one) is None
    assert RememberedSources(file, RULES).find(two) is None
    (tmp_path / "a.png").rename(tmp_path / "other")
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    assert RememberedSources(file, RULES).find(one) is not None
    old_file(tmp_path / "a.png", b"abcd")  # in place: the inode and the time stay
    assert RememberedSources(file, RULES).find(one) is None


def test_members_of_one_tar_are_told_apart(tmp_path):
    tar = old_file(tmp_path / "a.tar")
    sources = RememberedSources(tmp_path / "sources.json", RULES)
    first, second = (
        Candidate(ImageSource(f"a.tar/{offset}", tar, offset=offset, size=1), ("x",))
        for offset in (0, 1)
    )
    remember(sources, first)
    sources.save()
    again = RememberedSources(tmp_path / "sources.json", RULES)
    assert again.find(first) is not None
    assert again.find(second) is None


def test_a_file_that_may_still_change_is_not_remembered(tmp_path):
    path = tmp_path / "young.png"
    path.write_bytes(b"abc")
    sources = RememberedSources(tmp_path / "sources.json", RULES)
    remember(sources, candidate(path))
    sources.save()
    assert RememberedSources(tmp_path / "sources.json", RULES).find(candidate(path)) is None


def test_a_damaged_memory_is_an_empty_one(tmp_path):
    for content in (b"", b"[]", b'{"rules": 1}', b"\xff"):
        (tmp_path / "sources.json").write_bytes(content)
        sources = RememberedSources(tmp_path / "sources.json", RULES)
        assert sources.find(candidate(old_file(tmp_path / "a.png"))) is None


def test_failures_of_an_image_are_remembered_those_of_the_disk_are_not(tmp_path):
    file = tmp_path / "failures.json"
    RememberedFailures(file).remember(
        {"1": Skip("a.png", "undecodable", "cut off"), "2": Skip("b.png", "unreadable", "EIO")}
    )
    again = RememberedFailures(file)
    assert again.find("1", "renamed.png") == Skip("renamed.png", "undecodable", "cut off")
    assert again.find("2", "b.png") is None
