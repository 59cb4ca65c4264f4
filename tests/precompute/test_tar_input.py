"""WebDataset tars as input."""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset

from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError
from qwen_lora.precompute.inspect import inspect_image, read_source
from qwen_lora.precompute.scan import scan_dataset
from qwen_lora.precompute.types import Inspection, Scan

Members = Sequence[tuple[str, bytes]]
TWO: Members = [("1.jpg", b"one"), ("1.txt", b"a cat"), ("2.jpg", b"two"), ("2.txt", b"a dog")]


def tar_of(members: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def scan(path: Path, **settings: object) -> Scan:
    return scan_dataset(path, DataConfig(**settings))


def write(folder: Path, content: bytes, name: str = "a.tar") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def contents(found: Scan) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    return {
        candidate.image.name: (read_source(candidate.image), candidate.captions)
        for candidate in found.candidates
    }


def test_tar_written_by_webdataset(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(3):
            content = (image_folder / f"{index:02d}.png").read_bytes()
            text = {"caption": f"number {index}"}
            writer.write({"__key__": f"train/{index}", "png": content, "json": text})
    for dataset, prefix in ((tmp_path, "a.tar"), (path, "a.tar")):
        found = scan(dataset)
        assert found.skips == []
        assert [c.image.name for c in found.candidates] == [
            f"{prefix}/train/{index}.png" for index in range(3)
        ]
        for index, candidate in enumerate(found.candidates):
            assert candidate.captions == (f"number {index}",)
            assert candidate.group == "train"
            expected = (image_folder / f"{index:02d}.png").read_bytes()
            assert read_source(candidate.image) == expected
            assert isinstance(inspect_image(candidate, DataConfig()), Inspection)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path: Path, format: int) -> None:
    key = "x" * 90 + "/" + "\u732b" * 25
    write(tmp_path, tar_of([(f"{key}.jpg", b"one"), (f"{key}.txt", b"a cat")], format))
    assert contents(scan(tmp_path)) == {f"a.tar/{key}.jpg": (b"one", ("a cat",))}


def test_order_and_groups_among_files(tmp_path: Path) -> None:
    write(tmp_path, tar_of(TWO[2:]), "a.tar")
    for name in ("a.tar-.png", "a.tar0.png"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    write(tmp_path, tar_of([("z/9.jpg", b""), ("z/9.txt", b"x"), *TWO]), "cats/b.tar")
    found = [(c.image.name, c.group) for c in scan(tmp_path).candidates]
    assert found == [
        ("a.tar-.png", ""),
        ("a.tar/2.jpg", ""),
        ("a.tar0.png", ""),
        ("cats/b.tar/1.jpg", "cats"),
        ("cats/b.tar/2.jpg", "cats"),
        ("cats/b.tar/z/9.jpg", "cats"),
    ]


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    write(tmp_path, tar_of([TWO[2], TWO[1], ("./2.txt", b"a dog"), ("./1.jpg", b"one")]))
    assert contents(scan(tmp_path)) == {
        "a.tar/1.jpg": (b"one", ("a cat",)),
        "a.tar/2.jpg": (b"two", ("a dog",)),
    }


def test_skips_and_ignored(tmp_path: Path) -> None:
    write(
        tmp_path,
        tar_of(
            [
                ("1.jpg", b""),
                ("2.jpg", b""),
                ("2.txt", b"\xff"),
                ("3.jpg", b""),
                ("3.png", b""),
                ("3.txt", b"x"),
                ("4.gif", b""),
                ("5.jpg", b"kept"),
                ("5.jpg", b"not"),
                ("5.txt", b"x"),
                ("../6.jpg", b""),
                ("7.txt", b"alone"),
                ("8.cls", b"3"),
                ("._9.jpg", b""),
                ("__MACOSX/9.jpg", b""),
            ]
        ),
    )
    found = scan(tmp_path)
    assert contents(found) == {"a.tar/5.jpg": (b"kept", ("x",))}
    assert [(skip.name, skip.reason) for skip in found.skips] == [
        ("a.tar/../6.jpg", "bad_name"),
        ("a.tar/1.jpg", "caption_missing"),
        ("a.tar/2.jpg", "bad_encoding"),
        ("a.tar/3.jpg", "tar_several_images"),
        ("a.tar/3.png", "tar_several_images"),
        ("a.tar/4.gif", "unsupported_type"),
        ("a.tar/5.jpg", "tar_repeated_name"),
    ]
    assert found.ignored == {
        ".cls files in tars": 1,
        "captions in tars without an image": 1,
        "hidden": 2,
    }


def test_special_members_are_not_followed(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("3.jpg")
        info.type = tarfile.FIFOTYPE
        tar.addfile(info)
    write(tmp_path, file.getvalue())
    assert [(s.name, s.reason) for s in scan(tmp_path).skips] == [
        (f"a.tar/{number}.jpg", "not_a_file") for number in (1, 2, 3)
    ]


def test_two_caption_members_need_a_choice(tmp_path: Path) -> None:
    both = [("1.jpg", b""), ("1.txt", b"text"), ("1.json", b'{"caption": "json"}')]
    path = write(tmp_path, tar_of(both))
    with pytest.raises(InputError, match="a.tar/1.jpg .1.txt and 1.json"):
        scan(path)
    assert scan(path, caption_type="json").candidates[0].captions == ("json",)
    # A .json of other facts, as download tools write beside the text, is no second caption.
    write(tmp_path, tar_of([*both[:2], ("1.json", json.dumps({"url": "x"}).encode())]))
    assert scan(path).candidates[0].captions == ("text",)


def test_truncation_at_any_byte_is_reported(tmp_path: Path) -> None:
    """Whole samples stay; a cut never looks like a whole tar."""
    whole = tar_of(TWO)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    assert scan(write(tmp_path, whole)).skips == []
    for length in [*range(0, end + 512, 61), end - 1, end, end + 511]:
        found = scan(write(tmp_path, whole[:length]))
        assert ("a.tar", "tar_damaged") in [(s.name, s.reason) for s in found.skips], length
        assert {content for content, _ in contents(found).values()} <= {b"one", b"two"}
        names = [c.image.name for c in found.candidates]
        assert names == ["a.tar/1.jpg", "a.tar/2.jpg"][: len(names)]
        if length >= 2048:
            assert names[:1] == ["a.tar/1.jpg"]
    assert scan(write(tmp_path, whole[: end + 512])).skips == []


def test_damaged_header_is_reported(tmp_path: Path) -> None:
    whole = tar_of(TWO)
    for header in range(0, 4 * 1024, 1024):
        content = bytearray(whole)
        content[header + 150] ^= 1  # in its checksum
        found = scan(write(tmp_path, bytes(content)))
        assert [s.reason for s in found.skips if s.name == "a.tar"] == ["tar_damaged"], header
        assert any("damaged or cut off: a.tar" in hint for hint in found.hints)
        assert len(found.candidates) == (1 if header >= 2048 else 0)


def test_data_behind_the_end_is_reported(tmp_path: Path) -> None:
    """Two tars written one after the other: readers stop after the first."""
    write(tmp_path, tar_of(TWO[:2]) + tar_of(TWO[2:]))
    found = scan(tmp_path)
    assert list(contents(found)) == ["a.tar/1.jpg"]
    assert [(s.name, s.reason) for s in found.skips] == [("a.tar", "tar_damaged")]


@pytest.mark.parametrize("size", [-512, -1024, -1536, -2048])
@pytest.mark.parametrize("member", [0, 1])
def test_negative_sizes_end(tmp_path: Path, size: int, member: int) -> None:
    content = bytearray(tar_of(TWO))
    header = member * 1024
    content[header + 124 : header + 136] = (256**12 + size).to_bytes(13, "big")[1:]
    content[header + 148 : header + 156] = b" " * 8
    checksum = sum(content[header : header + 512])
    content[header + 148 : header + 156] = b"%06o\0 " % checksum
    found = scan(write(tmp_path, bytes(content)))
    assert [s.reason for s in found.skips if s.name == "a.tar"] == ["tar_damaged"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_compressed_tars_are_reported(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, gzip.compress(tar_of(TWO)), name)
    for dataset in (tmp_path, path):
        (skip,) = scan(dataset).skips
        assert (skip.name, skip.reason) == (name, "tar_compressed")
        assert "decompress" in skip.detail


def test_not_a_tar(tmp_path: Path) -> None:
    (skip,) = scan(write(tmp_path, b"<html>" * 1000)).skips
    assert (skip.name, skip.reason) == ("a.tar", "tar_damaged")


def test_names_that_are_no_utf8_or_steer_a_terminal(tmp_path: Path) -> None:
    names = ["\udcff", "\x1b[2J"]
    members = [(f"{name}.{kind}", b"x") for name in names for kind in ("jpg", "txt")]
    write(tmp_path, tar_of(members))
    found = scan(tmp_path)
    assert [c.image.name for c in found.candidates] == [r"a.tar/\x1b[2J.jpg", r"a.tar/\xff.jpg"]
    json.dumps([c.image.name for c in found.candidates]).encode()


def test_a_shard_set_is_no_dataset(tmp_path: Path) -> None:
    write(tmp_path, tar_of([("1.json", b"{}"), ("1.safetensors", b"")]))
    with pytest.raises(InputError, match="finished shard set"):
        scan(tmp_path)
