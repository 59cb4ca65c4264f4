"""Damaged and hostile shard sets: refused, or the damage lies outside every member."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.shards.manifest import content_name, fingerprint_difference, load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import RecordShape, check_values, decode_meta, decode_tensors
from qwen_lora.shards.safe import parse_json, parse_tensor_header
from qwen_lora.shards.verify import verify

from .conftest import FINGERPRINT, make_sample, write_set

MUTATIONS = 600
KINDS = ["*.tar", "shard-*.json", "manifest.json", "manifest-*.json", "unconditional-*"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One truncation, bit flip, header flip or repeated stretch."""
    kind = rng.choice(["truncate", "flip", "header", "repeat", "zero"])
    changed = bytearray(data)
    if kind == "truncate":
        return bytes(changed[: rng.randrange(len(data))])
    if kind == "repeat":
        begin = rng.randrange(len(data) // 2)
        return bytes(changed[: begin + 64] + changed[begin:])
    position = rng.randrange(min(512, len(data))) if kind == "header" else rng.randrange(len(data))
    if kind == "zero":
        changed[position : position + 64] = bytes(len(changed[position : position + 64]))
    else:
        changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_mutation_is_found_and_no_changed_byte_is_read(tmp_path: Path, kind: str) -> None:
    """verify finds each; a reader raises, or returns exactly what was written."""
    folder = write_set(tmp_path / "set", count=3, per_shard=3)
    with ShardSet.open(folder) as shards:
        sound = {shards.table.sample_id[row]: shards.read_bytes(row) for row in range(3)}
    path = next(folder.glob(kind))
    original = path.read_bytes()
    for seed in range(MUTATIONS if kind == "*.tar" else MUTATIONS // 3):
        changed = mutate(original, random.Random(seed))
        if changed == original:
            continue
        path.write_bytes(changed)
        try:
            found = not verify(folder).ok
        except InputError:
            found = True
        assert found, f"verify missed the mutation of seed {seed}"
        try:
            with ShardSet.open(folder) as shards:
                shards.unconditional()
                for row in range(len(shards)):
                    name = shards.table.sample_id[row]
                    assert shards.read_bytes(row) == sound[name], f"seed {seed}"
        except QwenLoraError:
            pass
    path.write_bytes(original)
    assert verify(folder, deep=True).ok


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A forged generation with right hashes, as an attacker would publish it."""
    value = json.loads((folder / "manifest.json").read_bytes())
    change(value)
    data = canonical_json(value)
    (folder / "manifest.json").write_bytes(data)
    (folder / content_name("manifest", sha256_hex(data), ".json")).write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "../shard-000000000000.tar",
        "/etc/passwd",
        "pipe:cat shard-000000000000.tar",
        "https://example.org/shard-000000000000.tar",
        "shard-000000000000.tar\n",
        "shard-00000000000.tar",
    ],
)
def test_names_that_are_not_the_formats_own_are_refused(shard_set: Path, name: str) -> None:
    rewrite_manifest(shard_set, lambda value: value["shards"][0]["tar"].update(name=name))
    with pytest.raises(ShardError, match="is not the name of a tar file"):
        ShardSet.open(shard_set)


def test_a_newer_format_is_refused_politely(shard_set: Path) -> None:
    rewrite_manifest(shard_set, lambda value: value.update(format_major=2))
    with pytest.raises(InputError, match=r"shard format 2\.0.*needs a newer qwen-lora"):
        ShardSet.open(shard_set)


def test_an_unknown_required_feature_is_refused(shard_set: Path) -> None:
    rewrite_manifest(shard_set, lambda value: value.update(required_features=["zstd"]))
    with pytest.raises(InputError, match="needs zstd"):
        ShardSet.open(shard_set)


def test_a_later_minor_version_is_read(shard_set: Path) -> None:
    rewrite_manifest(shard_set, lambda value: value.update(format_minor=7, something_new=1))
    with ShardSet.open(shard_set) as shards:
        assert len(shards) == 9


def test_an_edited_manifest_is_noticed(shard_set: Path) -> None:
    path = shard_set / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"some/model", b"mine/model"))
    with pytest.raises(ShardError, match="was edited"):
        ShardSet.open(shard_set)


def test_a_generation_with_other_content_than_its_name_is_refused(shard_set: Path) -> None:
    _, name = load_manifest(shard_set)
    path = shard_set / name
    path.write_bytes(path.read_bytes().replace(b"some/model", b"mine/model"))
    with pytest.raises(ShardError, match="its content belongs to"):
        ShardSet.open(shard_set, generation=name)


def test_what_is_not_a_shard_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no shard set at"):
        ShardSet.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="no manifest"):
        ShardSet.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"[]")
    with pytest.raises(ShardError, match="not a shard set's manifest"):
        ShardSet.open(tmp_path)


def test_missing_files_are_named(shard_set: Path) -> None:
    tar = next(shard_set.glob("*.tar"))
    tar.rename(tar.with_name("gone"))
    with pytest.raises(ShardError, match=f"{tar.name} is missing"):
        ShardSet.open(shard_set)
    assert any(tar.name in problem for problem in verify(shard_set).problems)


def test_a_swap_after_opening_is_noticed(shard_set: Path) -> None:
    with ShardSet.open(shard_set) as shards:
        for path in shard_set.glob("*.tar"):
            data = bytearray(path.read_bytes())
            data[600:5000] = bytes(4400)
            path.write_bytes(data)
        for row in range(len(shards)):
            if int(shards.table.member_offsets[row, 0]) < 5000:
                with pytest.raises(ShardError, match="damaged"):
                    shards.read(row)


SHAPE = RecordShape(("latents",), (16, 8, 8), (4,), 32)


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    sound = {
        "latents": torch.zeros(16, 8, 8, dtype=torch.float16),
        "prompt_embeds.0": torch.zeros(4, 32, dtype=torch.bfloat16),
        "prompt_mask.0": torch.ones(4, dtype=torch.bool),
    }
    return sound | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.zeros(1, dtype=torch.bool)}, "missing or unknown: extra"),
        ({"latents": torch.zeros(16, 8, 9, dtype=torch.float16)}, "the shard set says"),
        ({"latents": torch.zeros(16, 8, 8)}, "latents is F32"),
        ({"prompt_mask.0": torch.ones(5, dtype=torch.bool)}, "prompt_mask.0 is BOOL"),
        ({"latents": torch.full((16, 8, 8), float("nan")).half()}, "NaN or an infinity"),
        ({"prompt_embeds.0": torch.full((4, 32), float("inf")).bfloat16()}, "NaN or an infinity"),
        ({"latents": torch.zeros(16, 8, 8, dtype=torch.float64)}, "dtype 'F64'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor], message: str
) -> None:
    data = safetensors.torch.save(tensors(**changes))
    with pytest.raises(ShardError, match=message):
        decode_tensors(data, SHAPE)


def test_mask_bytes_are_true_or_false() -> None:
    data = bytearray(safetensors.torch.save(tensors()))
    entry = parse_tensor_header(bytes(data), "test")["prompt_mask.0"]
    data[entry.begin] = 2
    with pytest.raises(ShardError, match="other than true and false"):
        decode_tensors(bytes(data), SHAPE)


def forge(header: str, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no safetensors"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header of"),
        (forge("{" + " " * 70_000 + "}"), "header of"),
        (forge('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x"), "twice"),
        (forge('{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"xx"), "hole"),
        (forge('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"xy"), "after the last"),
        (forge('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,1]}}', b"x"), "1 bytes for U8"),
        (forge('{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', b"x"), "make no sense"),
        (forge("[" * 5000), "not valid JSON"),
        (forge("[]"), "not an object"),
    ],
)
def test_hostile_tensor_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        parse_tensor_header(data, "test")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'"' + b"x" * (256 << 10) + b'"', "more than"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        parse_json(data, "test")


@pytest.mark.parametrize(
    "change",
    [
        {"captions": "text"},
        {"bucket": [64]},
        {"flipped": 1},
        {"crop_box": [0, 0, 1.5, 2]},
        {"unknown": 1},
        {"source_sha256": None},
    ],
)
def test_records_with_wrong_facts_are_refused(change: dict[str, Any]) -> None:
    from dataclasses import asdict

    facts = asdict(make_sample(1).meta)
    assert decode_meta(canonical_json(facts)) == make_sample(1).meta
    with pytest.raises(ShardError):
        decode_meta(canonical_json(facts | change))


def test_finiteness_without_torch_agrees_with_torch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = torch.from_numpy(rng.integers(0, 1 << 16, 64, dtype=np.uint16))
        for dtype in (torch.float16, torch.bfloat16):
            data = safetensors.torch.save({"x": words.view(dtype)})
            finite = bool(torch.isfinite(words.view(dtype)).all())
            try:
                check_values(data, parse_tensor_header(data, "test"))
                found = True
            except ShardError:
                found = False
            assert found == finite


def test_fingerprint_differences_name_old_and_new() -> None:
    other = type(FINGERPRINT)("qwen-image", vae={"weights": ["a"]}, text={"weights": ["c"]})
    assert fingerprint_difference(FINGERPRINT, other) == ["text.weights: ['b'] -> ['c']"]
