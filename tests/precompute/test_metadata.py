"""metadata.jsonl, metadata.csv and captions.json."""

import json
from pathlib import Path

import pytest

from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError
from qwen_lora.precompute.scan import scan_dataset
from qwen_lora.precompute.types import Scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png, b.png and sub/c.png; only names matter here."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def scan(folder: Path, **settings: object) -> Scan:
    return scan_dataset(folder, DataConfig(**settings))


def by_name(found: Scan) -> dict[str, tuple[str, ...]]:
    return {candidate.image.name: candidate.captions for candidate in found.candidates}


ROWS = [
    {"file_name": "a.png", "text": "one"},
    {"file_name": "b.png", "prompt": "two, with a comma"},
    {"file_name": "./sub/c.png", "caption": "three"},
]
EXPECTED = {"a.png": ("one",), "b.png": ("two, with a comma",), "sub/c.png": ("three",)}


def test_jsonl(folder: Path) -> None:
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (folder / "metadata.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    assert by_name(scan(folder)) == EXPECTED


def test_csv(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes(
        b'\xef\xbb\xbffile_name,size,text\r\na.png,3,one\r\nb.png,,"two, with a comma"\r\n'
        b"sub/c.png,1,three\r\n"
    )
    assert by_name(scan(folder)) == EXPECTED


def test_csv_caption_of_several_lines(folder: Path) -> None:
    (folder / "metadata.csv").write_text('text,file_name\n"one\ntwo",a.png\n')
    assert by_name(scan(folder, caption_lines="variants")) == {"a.png": ("one", "two")}


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        {"a.png": "one", "b.png": ["two, with a comma"], "sub/c.png": {"caption": "three"}},
    ],
)
def test_captions_json(folder: Path, content: object) -> None:
    (folder / "captions.json").write_text(json.dumps(content))
    assert by_name(scan(folder)) == EXPECTED


def test_list_of_texts_is_several_captions(folder: Path) -> None:
    (folder / "captions.json").write_text(json.dumps({"a.png": ["one", "two"]}))
    assert by_name(scan(folder)) == {"a.png": ("one", "two")}


def test_metadata_is_for_its_own_directory(folder: Path) -> None:
    (folder / "sub/metadata.jsonl").write_text('{"file_name": "c.png", "text": "three"}')
    assert by_name(scan(folder)) == {"sub/c.png": ("three",)}
    (folder / "sub/metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}')
    with pytest.raises(InputError, match=r"sub/metadata.jsonl row 1: sub/a.png is not there"):
        scan(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{', "jsonl row 2: not JSON"),
        ("metadata.jsonl", '\n["a.png"]', "row 2: not a JSON object"),
        ("metadata.jsonl", '{"text": "x"}', "row 1: no file_name"),
        ("metadata.jsonl", '{"file_name": 3, "text": "x"}', "row 1: no file_name"),
        ("metadata.jsonl", '{"file_name": "../x.png", "text": "x"}', "leads out"),
        ("metadata.jsonl", '{"file_name": "sub/../a.png", "text": "x"}', "leads out"),
        ("metadata.jsonl", '{"file_name": "/etc/passwd", "text": "x"}', "leads out"),
        ("metadata.jsonl", '{"file_name": "gone.png", "text": "x"}', "gone.png is not there"),
        (
            "metadata.jsonl",
            r'{"file_name": "a\u0000.png", "text": "x"}',
            r"a\\x00.png is not there",
        ),
        ("metadata.jsonl", r'{"file_name": "a\ud800.png", "text": "x"}', "is no file name"),
        ("metadata.jsonl", r'{"file_name": "a\u001b[2J", "text": "x"}', r"a\\x1b\[2J is not there"),
        ("metadata.jsonl", '{"file_name": ".", "text": "x"}', "is not there"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "y"}',
            "row 2: a.png has a caption in metadata.jsonl row 1",
        ),
        ("metadata.csv", "name,text\na.png,x\n", "first line must name the columns"),
        ("metadata.csv", "file_name,tags\na.png,x\n", "first line must name the columns"),
        ("metadata.csv", "", "first line must name the columns"),
        ("metadata.csv", "file_name,text\na.png,a cat, sitting\n", "row 1: more cells"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "metadata.csv line"),
        ("captions.json", '{"a.png": "x", "a.png": "y"}', "is there twice"),
        ("captions.json", '"a.png"', "neither an object"),
        ("captions.json", '[{"text": "x"}]', "row 1: no file_name"),
        ("captions.json", '["x"]', "row 1: not an object"),
        ("captions.json", '{"images": []}', "row 1: images is not there"),
    ],
)
def test_wrong_metadata(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        scan(folder)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv", "captions.json"])
def test_metadata_that_is_not_utf8(folder: Path, file: str) -> None:
    (folder / file).write_bytes('{"file_name": "a.png"}'.encode("utf-16"))
    with pytest.raises(InputError, match=f"{file}.*not UTF-8"):
        scan(folder)


def test_bad_caption_in_a_row_is_that_image_s_skip(folder: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": 3},
        {"file_name": "b.png", "text": "a\0"},
        {"file_name": "sub/c.png", "label": 1},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    reasons = {skip.name: skip.reason for skip in scan(folder).skips}
    assert reasons == {
        "a.png": "caption_unreadable",
        "b.png": "bad_encoding",
        "sub/c.png": "caption_missing",
    }


def test_row_without_a_caption_leaves_the_sidecar(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 1}')
    (folder / "a.txt").write_text("beside")
    assert by_name(scan(folder)) == {"a.png": ("beside",)}


def test_sidecar_and_row_need_a_choice(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("beside")
    with pytest.raises(
        InputError, match="for 2 of the images: a.png .a.txt and metadata.jsonl row 1.*b.png"
    ):
        scan(folder)
    assert by_name(scan(folder, caption_source="sidecar")) == {
        **EXPECTED,
        "a.png": ("beside",),
        "b.png": ("beside",),
    }
    assert by_name(scan(folder, caption_source="metadata")) == EXPECTED


def test_two_metadata_files_for_one_image(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/c.png", "text": "x"}')
    (folder / "sub/metadata.csv").write_text("file_name,text\nc.png,y\n")
    for source in ("error", "metadata", "sidecar"):
        with pytest.raises(InputError, match="metadata.jsonl row 1 and sub/metadata.csv row 1"):
            scan(folder, caption_source=source)


def test_json_beside_a_row_that_holds_other_things(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}')
    (folder / "a.json").write_text('{"exif": 1}')
    assert by_name(scan(folder)) == {"a.png": ("one",)}


def test_names_beyond_ascii(folder: Path) -> None:
    (folder / "caf\u00e9 \u732b.png").write_bytes(b"")
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "caf\u00e9 \u732b.png", "text": "one"}), encoding="utf-8"
    )
    assert by_name(scan(folder)) == {"caf\u00e9 \u732b.png": ("one",)}


def test_a_named_image_that_is_missing_is_reported_and_stops_nothing(folder: Path) -> None:
    (folder / "folder.png").mkdir()
    names = ["a.png", "gone.png", "sub/gone.png", "folder.png"]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = scan(folder)
    assert by_name(found)["a.png"] == ("x",)
    missing = [skip for skip in found.skips if skip.reason == "image_missing"]
    assert [skip.name for skip in missing] == ["folder.png", "gone.png", "sub/gone.png"]
    assert missing[1].detail == "metadata.jsonl row 2 names it; it is not there"
