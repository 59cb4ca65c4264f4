"""Walking a dataset folder."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError
from qwen_lora.precompute import inspect, walk
from qwen_lora.precompute.scan import scan_dataset
from qwen_lora.precompute.types import Scan
from qwen_lora.precompute.walk import FOLDER_VISITS_MAX, Tree, json_name


def scan(folder: Path, **settings: object) -> Scan:
    return scan_dataset(folder, DataConfig(**settings))


def add(folder: Path, *names: str, caption: str | None = "x") -> None:
    """Files of these names, each with a caption beside it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)


def names(found: Scan) -> list[str]:
    return [candidate.image.name for candidate in found.candidates]


def reasons(found: Scan) -> dict[str, str]:
    return {skip.name: skip.reason for skip in found.skips}


def test_image_types(tmp_path: Path) -> None:
    types = "jpg JPG jpeg jpe jfif png webp bmp tif tiff avif heic heif hif".split()
    add(tmp_path, *(f"{index:02d}.{kind}" for index, kind in enumerate(types)))
    assert names(scan(tmp_path)) == [f"{index:02d}.{kind}" for index, kind in enumerate(types)]


def test_other_files(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    for name in (
        "b.gif",
        "c.PSD",
        "d.svg",
        "e.raw",
        "notes.md",
        "f.md",
        "LICENSE",
        "g.json",
        "h.MOV",
    ):
        (tmp_path / name).write_bytes(b"")
    found = scan(tmp_path)
    assert names(found) == ["a.png"]
    assert reasons(found) == dict.fromkeys(("b.gif", "c.PSD", "d.svg", "e.raw"), "unsupported_type")
    assert found.ignored == {
        ".json files that caption no image": 1,
        ".md files": 2,
        ".mov files": 1,
        "files without an extension": 1,
    }


def test_heif_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, "a.heic", "b.png")
    inspect.heif_available.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    try:
        found = scan(tmp_path)
    finally:
        inspect.heif_available.cache_clear()
    assert names(found) == ["b.png"]
    assert reasons(found) == {"a.heic": "heif_missing"}
    assert any("qwen-lora[heif]" in hint for hint in found.hints)


def test_hidden_and_system_files_are_counted(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    add(tmp_path, ".b.png", "._a.png", ".git/c.png", caption=None)
    add(tmp_path, "@eaDir/a.png", "__MACOSX/a.png", "Thumbs.db", "x/desktop.ini", caption=None)
    found = scan(tmp_path)
    assert names(found) == ["a.png"]
    assert found.skips == []
    assert found.ignored == {"hidden": 3, "system files": 4}


@pytest.mark.parametrize("locale", ["C", "de_DE.UTF-8", "tr_TR.UTF-8"])
def test_order_is_that_of_the_bytes(tmp_path: Path, locale: str) -> None:
    expected = ["B.png", "I.png", "a-b/1.png", "a.png", "a/1.png", "a0.png", "i.png", "\u0131.png"]
    shuffled = list(expected)
    random.Random(locale).shuffle(shuffled)
    add(tmp_path, *shuffled)
    code = (
        "import sys, pathlib; from qwen_lora.config.schema import DataConfig;"
        "from qwen_lora.precompute.scan import scan_dataset;"
        "found = scan_dataset(pathlib.Path(sys.argv[1]), DataConfig());"
        "print(ascii([c.image.name for c in found.candidates]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "LC_ALL": locale},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ascii(expected)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    raw = [b"\x01", b"\\", b"\xff", b"\xc3\xa9", b"a\nb"]
    for stem in raw:
        for end in (b".png", b".txt"):
            with open(os.fsencode(tmp_path) + b"/" + stem + end, "wb") as file:
                file.write(b"x")
    found = scan(tmp_path)
    assert found.skips == []
    # In the order of the bytes, not of what stands for them.
    assert names(found) == [r"\x01.png", r"\\.png", r"a\x0ab.png", "\u00e9.png", r"\xff.png"]
    assert all(candidate.image.path.exists() for candidate in found.candidates)
    json.dumps(names(found), ensure_ascii=False).encode()


def test_names_for_json_differ_where_the_names_differ() -> None:
    raw = [b"\x85", b"\xc2\x85", rb"\x85", rb"\\x85", b"\xe2\x80\xae", rb"\xe2\x80\xae", b"\\"]
    assert len({json_name(name) for name in raw}) == len(raw)
    assert (
        json_name("caf\u00e9 \u732b \u3000 \U0001f44d\u200d")
        == "caf\u00e9 \u732b \u3000 \U0001f44d\u200d"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.usefixtures("within_seconds")
def test_only_regular_files_are_opened() -> None:
    # A socket's path is short, so not below tmp_path.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        add(folder, "dir.jpg/inside.png")
        add(folder, "d.png", "e.png", caption=None)
        os.mkfifo(folder / "a.jpg")
        os.mkfifo(folder / "d.txt")
        os.mkfifo(folder / "pipe")
        os.mkfifo(folder / "c.tar")
        (folder / "e.txt").mkdir()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "b.jpg"))
            found = scan(folder)
    assert names(found) == ["dir.jpg/inside.png"]
    assert reasons(found) == {
        "a.jpg": "not_a_file",
        "b.jpg": "not_a_file",
        "c.tar": "not_a_file",
        "d.png": "not_a_file",
        "dir.jpg": "not_a_file",
        "e.png": "caption_missing",
    }
    assert found.ignored == {"links and special files": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.usefixtures("within_seconds")
@pytest.mark.parametrize("name", ["a.txt", "c.tar"])
def test_a_pipe_that_takes_a_files_place_does_not_block(tmp_path: Path, name: str) -> None:
    add(tmp_path, "a.png")
    (tmp_path / "c.tar").write_bytes(b"")
    listed = walk.walk(tmp_path, False)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)

    def replaced(root: Path, follow_symlinks: bool) -> Tree:
        return listed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_lora.precompute.scan.walk", replaced)
        found = scan(tmp_path)
    (detail,) = (skip.detail for skip in found.skips if skip.name == name.replace("txt", "png"))
    assert "not a regular file" in detail


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.usefixtures("within_seconds")
def test_a_metadata_file_that_is_a_pipe(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(InputError, match="metadata.jsonl cannot be read"):
        scan(tmp_path)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A dataset with links of every kind."""
    folder, outside = tmp_path / "data", tmp_path / "outside"
    add(folder, "real/a.png")
    add(outside, "b.png", "deep/c.png")
    for link, target in (
        ("inside.png", "real/a.png"),
        ("inside.txt", "real/a.txt"),
        ("copy", "real"),
        ("out.png", outside / "b.png"),
        ("out.txt", outside / "b.txt"),
        ("more", outside / "deep"),
        ("real/loop", ".."),
        ("self.png", "self.png"),
        ("dangling.png", "nothing.png"),
        ("README", "nothing"),
    ):
        (folder / link).symlink_to(target)
    add(folder, "d.png", caption=None)
    (folder / "d.txt").symlink_to(outside / "b.txt")
    return folder


def test_links(linked: Path) -> None:
    found = scan(linked)
    assert names(found) == ["copy/a.png", "inside.png", "real/a.png"]
    assert reasons(found) == {
        "copy/loop": "symlink_loop",
        "d.png": "symlink_outside",
        "dangling.png": "symlink_dangling",
        "more": "symlink_outside",
        "out.png": "symlink_outside",
        "real/loop": "symlink_loop",
        "self.png": "symlink_loop",
    }
    (detail,) = {skip.detail for skip in found.skips if skip.name == "more"}
    assert "data_config.follow_symlinks" in detail
    assert found.ignored["links and special files"] == 1


def test_links_that_are_followed(linked: Path) -> None:
    found = scan(linked, follow_symlinks=True)
    assert names(found) == [
        "copy/a.png",
        "d.png",
        "inside.png",
        "more/c.png",
        "out.png",
        "real/a.png",
    ]
    assert set(reasons(found).values()) == {"symlink_loop", "symlink_dangling"}


def test_links_between_folders_cannot_multiply_for_ever(tmp_path: Path) -> None:
    """Two links a level: a million paths lead to the last of 21 folders."""
    depth = 20
    for level in range(depth):
        (tmp_path / f"d{level:02d}").mkdir()
        for link in "xy":
            (tmp_path / f"d{level:02d}" / link).symlink_to(f"../d{level + 1:02d}")
    add(tmp_path, f"d{depth}/a.png")
    found = scan(tmp_path)
    assert f"d{depth}/a.png" in names(found)
    assert len(names(found)) <= FOLDER_VISITS_MAX
    assert set(reasons(found).values()) == {"symlink_repeated"}


def test_a_dataset_that_is_itself_a_link(tmp_path: Path) -> None:
    add(tmp_path / "real", "a.png")
    (tmp_path / "real/b.png").symlink_to("a.png")
    (tmp_path / "real/b.txt").symlink_to("a.txt")
    (tmp_path / "link").symlink_to("real")
    assert names(scan(tmp_path / "link")) == ["a.png", "b.png"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_read() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        add(folder, "a.png", "closed/b.png")
        folder.chmod(0o755)
        (folder / "closed").chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(InputError, match="closed cannot be read: Permission denied"):
                scan(folder)
        finally:
            if root:
                os.seteuid(0)
    finally:
        (folder / "closed").chmod(0o700)
        shutil.rmtree(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone does not exist"):
        scan(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no image; it holds nothing"):
        scan(tmp_path)
    (tmp_path / "a.md").write_text("")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"1 .md files, 1 .txt files that caption no image"):
        scan(tmp_path)
    with pytest.raises(InputError, match="neither a folder nor a .tar"):
        scan(tmp_path / "a.md")


@pytest.mark.parametrize("kind", ["txt", "caption", "json"])
def test_sidecar_types(tmp_path: Path, kind: str) -> None:
    for index, end in enumerate(("txt", "caption", "json")):
        add(tmp_path, f"{index}.v1.png", caption=None)
        content = '{"prompt": "json"}' if end == "json" else end
        (tmp_path / f"{index}.v1.{end}").write_text(content)
    assert [c.captions for c in scan(tmp_path).candidates] == [("txt",), ("caption",), ("json",)]
    found = scan(tmp_path, caption_type=kind)
    assert [c.captions for c in found.candidates] == [(kind,)]
    assert set(reasons(found).values()) == {"caption_missing"}


def test_two_sidecars_need_a_choice(tmp_path: Path) -> None:
    for index in range(5):
        add(tmp_path, f"{index}.png")
        (tmp_path / f"{index}.caption").write_text("y")
    expected = r"for 5 of the images: 0.png \(0.txt and 0.caption\).*; and 2 more.*caption_type"
    for source in ("error", "sidecar"):
        with pytest.raises(InputError, match=expected):
            scan(tmp_path, caption_source=source)
    assert {c.captions for c in scan(tmp_path, caption_type="caption").candidates} == {("y",)}


def test_sidecars_that_differ_in_case(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    (tmp_path / "a.TXT").write_text("y")
    if len(list(tmp_path.iterdir())) == 2:
        pytest.skip("a file system that ignores case")
    with pytest.raises(InputError, match="a.TXT and a.txt"):
        scan(tmp_path)


def test_json_of_other_facts_is_no_second_caption(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    add(tmp_path, "b.png", caption=None)
    for stem in "ab":
        (tmp_path / f"{stem}.json").write_text('{"url": "x"}')
    found = scan(tmp_path)
    assert [c.captions for c in found.candidates] == [("x",)]
    assert reasons(found) == {"b.png": "caption_missing"}


def test_two_images_may_share_a_caption(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "a.jpg")
    assert names(scan(tmp_path)) == ["a.jpg", "a.png"]


def test_missing_captions(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "b.png", caption=None)
    found = scan(tmp_path)
    assert reasons(found) == {"a.png": "caption_missing", "b.png": "caption_missing"}
    (hint,) = found.hints
    assert ".txt .caption .json" in hint and "metadata.jsonl" in hint
    (tmp_path / "a.txt").write_text("x")
    assert scan(tmp_path).hints == []


def test_empty_caption(tmp_path: Path) -> None:
    add(tmp_path, "a.png", caption=" \n")
    assert reasons(scan(tmp_path)) == {"a.png": "caption_empty"}
    assert scan(tmp_path, empty_caption="unconditional").candidates[0].captions == ("",)


def test_groups_are_first_folders(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "10_cat/b.png", "10_cat/deep/c.png", "dog/d.png")
    found = scan(tmp_path)
    groups = {c.image.name: c.group for c in found.candidates}
    assert groups == {
        "10_cat/b.png": "10_cat",
        "10_cat/deep/c.png": "10_cat",
        "a.png": "",
        "dog/d.png": "dog",
    }
    (hint,) = found.hints
    assert "10_cat" in hint and "data_config.kohya_repeats" in hint
    assert scan(tmp_path, kohya_repeats=True).hints == []
    assert [c.group for c in scan(tmp_path, kohya_repeats=True).candidates][0] == "10_cat"


def test_deep_folders(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 400)
    add(tmp_path, f"{deep}/a.png")
    assert names(scan(tmp_path)) == [f"{deep}/a.png"]
