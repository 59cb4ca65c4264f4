"""Sets whose hashes are right but whose contents make no sense: refused, never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.shards import tools
from qwen_lora.shards.manifest import content_name, load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.safe import parse_json, parse_tensor_header, printable
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import adoptable_shards

from .conftest import FINGERPRINT, write_set

ODD = [
    *(None, True, -1, 0, 1 << 40, 1 << 70, 1.5, "", "\x1b[31mred", "a" * 70),
    *([], {}, [[]], [None], {"a": 1}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value, of lists the first two."""
    if path:
        yield path
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:2]))
    for key, item in inner:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def publish_value(folder: Path, manifest: dict[str, Any]) -> None:
    for path in folder.glob("manifest*"):
        path.unlink()
    data = canonical_json(manifest)
    for name in ("manifest.json", content_name("manifest", sha256_hex(data), ".json")):
        (folder / name).write_bytes(data)


def publish_sidecar(folder: Path, manifest: dict[str, Any], sidecar: Any) -> None:
    """Write the first shard's sidecar with a manifest that vouches for it."""
    data = canonical_json(sidecar)
    entry = manifest["shards"][0]["sidecar"]
    (folder / entry["name"]).write_bytes(data)
    new = entry | {"bytes": len(data), "sha256": sha256_hex(data)}
    publish_value(folder, changed(manifest, ("shards", 0, "sidecar"), new))


def use_everything(folder: Path) -> None:
    """Each entry point either works or raises one of this project's errors."""

    def read() -> None:
        with ShardSet.open(folder) as shards:
            shards.unconditional()
            shards.rgb_map()
            shards.preview_prompts()
            for row in range(len(shards)):
                shards.read(row)

    uses: list[Callable[[], object]] = [
        read,
        lambda: verify(folder, deep=True),
        lambda: tools.format_info(tools.info(folder)),
        lambda: list(tools.list_samples(folder)),
        lambda: adoptable_shards(folder, FINGERPRINT),
    ]
    for use in uses:
        try:
            use()
        except QwenLoraError as error:
            assert "\x1b" not in str(error)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = write_set(tmp_path / "set", count=2, per_shard=2)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return folder, manifest


def test_any_odd_value_in_a_manifest_is_refused_or_harmless(
    small: tuple[Path, dict[str, Any]],
) -> None:
    folder, manifest = small
    for index, path in enumerate(places(manifest)):
        for odd in ODD[index % 2 :: 2]:  # half of them at each place
            publish_value(folder, changed(manifest, path, odd))
            use_everything(folder)


def test_any_odd_value_in_a_sidecar_is_refused_or_harmless(
    small: tuple[Path, dict[str, Any]],
) -> None:
    folder, manifest = small
    sidecar = json.loads((folder / manifest["shards"][0]["sidecar"]["name"]).read_bytes())
    for index, path in enumerate(places(sidecar)):
        for odd in ODD[index % 2 :: 2]:
            publish_sidecar(folder, manifest, changed(sidecar, path, odd))
            use_everything(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("group", "elsewhere"),
        ("bucket", [96, 48]),
        ("source_sha256", "0" * 64),
        ("token_counts", [5]),
    ],
)
def test_a_sidecar_that_differs_from_its_records_is_found(
    small: tuple[Path, dict[str, Any]], column: str, value: Any
) -> None:
    """Nothing vouches for an unlisted sidecar, so adoption compares it with the tar itself."""
    folder, manifest = small
    name = manifest["shards"][0]["sidecar"]["name"]
    sidecar = json.loads((folder / name).read_bytes())
    assert len(adoptable_shards(folder, FINGERPRINT)) == 1
    texts = sidecar["columns"]["text_ids"]
    row = next(row for row in range(2) if len(texts[row]) == 1)
    assert sidecar["columns"][column][row] != value
    publish_sidecar(folder, manifest, changed(sidecar, ("columns", column, row), value))
    assert adoptable_shards(folder, FINGERPRINT) == []
    assert any("sample" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("unconditional", "../unconditional-000000000000.safetensors"),
        ("unconditional", "unconditional-000000000000.safetensors"),
        ("retired", "/etc/passwd"),
        ("previews", "file:///etc/passwd"),
        ("previous", "../manifest-000000000000.json"),
    ],
)
def test_listed_names_are_bare_and_content_named(
    small: tuple[Path, dict[str, Any]], kind: str, name: str
) -> None:
    folder, manifest = small
    entry = name if kind == "previous" else manifest["unconditional"] | {"name": name}
    publish_value(folder, manifest | {kind: entry})
    with pytest.raises(ShardError, match="is not the name of|not named by its content"):
        ShardSet.open(folder)


def test_every_damaged_generation_is_found(shard_set: Path) -> None:
    """manifest.json is whole; the copy that a resume would pin is not."""
    _, name = load_manifest(shard_set)
    path = shard_set / name
    path.write_bytes(path.read_bytes()[:-1])
    report = verify(shard_set)
    assert len(report.problems) == 1 and name in report.problems[0]


def test_all_problems_are_reported(shard_set: Path) -> None:
    tars = sorted(shard_set.glob("*.tar"))
    for path in tars:
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    (shard_set / load_manifest(shard_set)[0].unconditional.name).unlink()
    problems = "\n".join(verify(shard_set).problems)
    assert all(path.name in problems for path in tars) and "unconditional" in problems


@pytest.mark.parametrize("name", ["../manifest-000000000000.json", "manifest.json.bak", "/etc/x"])
def test_a_pinned_generation_is_named_by_its_file(shard_set: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a generation"):
        ShardSet.open(shard_set, generation=name)


def test_a_pinned_generation_that_is_gone(shard_set: Path) -> None:
    with pytest.raises(InputError, match="has no generation manifest-000000000000.json"):
        ShardSet.open(shard_set, generation="manifest-000000000000.json")


@pytest.mark.parametrize("use", [ShardSet.open, verify, tools.info])
@pytest.mark.parametrize("url", ["https://example.org/set", "s3://bucket/set"])
def test_urls_are_told_apart_from_folders(use: Callable[[Any], object], url: str) -> None:
    with pytest.raises(InputError, match="looks like a URL: give it as text, not as a path"):
        use(Path(url))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_not_waited_for(shard_set: Path) -> None:
    path = next(shard_set.glob("unconditional-*"))
    path.unlink()
    os.mkfifo(path)
    with ShardSet.open(shard_set) as shards, pytest.raises(ShardError, match="0 bytes"):
        shards.unconditional()


def test_text_that_could_steer_a_terminal_is_escaped(small: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = small
    hostile = {"id": "m\x1b]0;title\x07", "revision": "\u202e"}
    publish_value(folder, manifest | {"model": hostile, "recipe": {"\x1b[2J": "\r"}})
    shown = tools.format_info(tools.info(folder))
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert r"m\x1b]0;title\x07@\u202e" in shown
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"


@pytest.mark.parametrize("data", [b'"\\ud800"', b'{"a":["\\udc00x"]}', b"[1e999]", b"-Infinity"])
def test_json_that_could_not_be_written_again_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match="not valid JSON"):
        parse_json(data, "test")


def test_paired_surrogates_are_text() -> None:
    assert parse_json(canonical_json(["\U0001f600"]), "test") == ["\U0001f600"]


@pytest.mark.parametrize("entry", [{"dtype": []}, {"shape": ""}, {"shape": [True]}, {"x": 1}])
def test_tensor_entries_of_the_wrong_types_are_refused(entry: dict[str, Any]) -> None:
    sound = {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}
    header = canonical_json({"a": sound | entry})
    with pytest.raises(ShardError):
        parse_tensor_header(len(header).to_bytes(8, "little") + header + b"\1", "test")
