"""The map to RGB and the preview prompts: written, read, and refused when they make no sense."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from qwen_lora.errors import ShardError
from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.shards import previews, tools
from qwen_lora.shards.manifest import content_name, load_manifest
from qwen_lora.shards.previews import PreviewPrompt, RgbMap
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import write_previews, write_rgb

from .conftest import CHANNELS, SCALE, WIDTH, publish, sorted_samples, write_one
from .test_hostile_sets import ODD, changed, places, publish_value, use_everything

PROMPTS = ["a red fox, sitting", "ein \u00dcbermut \U0001f98a", 'quotes " and \\ \n']


def make_rgb(seed: int = 0) -> RgbMap:
    rng = np.random.default_rng(seed)
    patch = 3 * SCALE * SCALE
    weight = rng.normal(0, 0.02, (9 * CHANNELS, patch)).astype(np.float32)
    return RgbMap(weight, rng.uniform(0, 1, patch).astype(np.float32), SCALE, 0.0512345678)


def make_prompts(texts: list[str] = PROMPTS) -> list[PreviewPrompt]:
    generator = torch.Generator().manual_seed(3)
    return [
        PreviewPrompt(
            text,
            torch.randn(5 + index, WIDTH, generator=generator).bfloat16(),
            torch.ones(5 + index, dtype=torch.bool),
        )
        for index, text in enumerate(texts)
    ]


@pytest.fixture
def preview_set(tmp_path: Path) -> Path:
    """Two samples, the map and three prompts, in a folder that a test may damage."""
    folder = tmp_path / "set"
    folder.mkdir()
    shard = write_one(folder, sorted_samples(2))
    publish(
        folder,
        [shard],
        previews=write_previews(folder, make_prompts()),
        rgb=write_rgb(folder, make_rgb()),
    )
    return folder


def replace_listed(folder: Path, kind: str, data: bytes) -> None:
    """Another content of the map or the prompts, under right names and hashes."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    digest = sha256_hex(data)
    name = content_name(kind, digest, Path(manifest[kind]["name"]).suffix)
    (folder / name).write_bytes(data)
    publish_value(folder, manifest | {kind: {"name": name, "bytes": len(data), "sha256": digest}})


def read_both(folder: Path) -> None:
    with ShardSet.open(folder) as shards:
        shards.rgb_map()
        shards.preview_prompts()


def refused(folder: Path, match: str) -> None:
    """Reading, info and `verify --deep` refuse alike."""
    with pytest.raises(ShardError, match=match):
        read_both(folder)
    with pytest.raises(ShardError, match=match):
        tools.info(folder)
    assert not verify(folder, deep=True).ok
    use_everything(folder)


def test_what_was_written_is_read(preview_set: Path) -> None:
    rgb, prompts = make_rgb(), make_prompts()
    with ShardSet.open(preview_set) as shards:
        read, texts = shards.rgb_map(), shards.preview_prompts()
    assert read is not None and read.scale == SCALE
    assert read.weight.dtype == read.bias.dtype == np.float32
    assert np.abs(read.weight / rgb.weight - 1).max() < 6e-5  # five digits
    assert np.abs(read.bias / rgb.bias - 1).max() < 6e-5
    assert read.mean_abs_error == 0.051235
    assert [prompt.prompt for prompt in texts] == PROMPTS
    for got, made in zip(texts, prompts, strict=True):
        assert torch.equal(got.prompt_embeds, made.prompt_embeds)
        assert got.prompt_mask.dtype == torch.bool and torch.equal(
            got.prompt_mask, made.prompt_mask
        )
    assert verify(preview_set, deep=True).ok
    facts = tools.info(preview_set)
    assert facts["preview_prompts"] == PROMPTS and facts["rgb_map"]["scale"] == SCALE
    told = tools.format_info(facts)
    assert "8 pixels a latent, mean error 0.051; 3 prompts" in told and "a red fox" in told


def test_plain_json_and_safetensors_read_both_files(preview_set: Path) -> None:
    """What docs/shards.md says, done without this project: the map is applied to one position."""
    manifest = json.loads((preview_set / "manifest.json").read_bytes())
    with safetensors.safe_open(preview_set / manifest["previews"]["name"], "pt") as file:
        assert json.loads(file.metadata()["prompts"]) == PROMPTS
        assert len(list(file.keys())) == 2 * len(PROMPTS)
        assert file.get_tensor("prompt_embeds.1").shape == (6, WIDTH)
    facts = json.loads((preview_set / manifest["rgb"]["name"]).read_bytes())
    latents = np.random.default_rng(5).normal(size=(CHANNELS, 5, 7)).astype(np.float32)
    row, column, colour, y, x = 4, 2, 1, 3, 6  # the last row: its lower neighbours repeat it
    total = facts["bias"][(colour * SCALE + y) * SCALE + x]
    for channel in range(CHANNELS):
        for down in range(3):
            for right in range(3):
                value = latents[channel, min(row + down - 1, 4), column + right - 1]
                weights = facts["weight"][(channel * 3 + down) * 3 + right]
                total += value * weights[(colour * SCALE + y) * SCALE + x]
    with ShardSet.open(preview_set) as shards:
        rgb = shards.rgb_map()
    assert rgb is not None
    image = rgb.apply(latents)
    assert image.shape == (5 * SCALE, 7 * SCALE, 3)
    pixel = image[row * SCALE + y, column * SCALE + x, colour]
    assert abs(int(pixel) - min(max(total, 0), 1) * 255) <= 0.51


def test_equal_contents_are_equal_bytes() -> None:
    assert previews.encode_rgb(make_rgb()) == previews.encode_rgb(make_rgb())
    read = previews.decode_rgb(previews.encode_rgb(make_rgb()), CHANNELS, SCALE, "map")
    assert previews.encode_rgb(read) == previews.encode_rgb(make_rgb())
    assert len({previews.encode_previews(make_prompts()) for _ in range(20)}) == 1


def test_a_set_without_either_has_none(shard_set: Path) -> None:
    with ShardSet.open(shard_set) as shards:
        assert shards.rgb_map() is None and shards.preview_prompts() == []
    assert "no latent-to-RGB map; 0 prompts" in tools.format_info(tools.info(shard_set))


@pytest.mark.parametrize("kind", ["rgb", "previews"])
def test_a_changed_byte_is_refused(preview_set: Path, kind: str) -> None:
    path = next(preview_set.glob(f"{kind}-*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(preview_set, "is damaged")


def test_any_odd_value_in_a_map_is_refused_or_harmless(preview_set: Path) -> None:
    facts = json.loads(previews.encode_rgb(make_rgb()))
    for index, path in enumerate(places(facts)):
        for odd in ODD[index % 2 :: 2]:
            replace_listed(preview_set, "rgb", canonical_json(changed(facts, path, odd)))
            try:
                read_both(preview_set)
            except ShardError as error:
                assert "\x1b" not in str(error)


def with_value(path: tuple[Any, ...], value: Any) -> Callable[[], bytes]:
    facts = json.loads(previews.encode_rgb(make_rgb()))
    return lambda: json.dumps(changed(facts, path, value)).encode()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (with_value(("weight", 1, 2), float("nan")), "NaN is not JSON"),
        (with_value(("weight", 1, 2), 1e7), "numbers of at most"),
        (with_value(("weight", 1, 2), "0.5"), "numbers of at most"),
        (with_value(("bias", 0), True), "numbers of at most"),
        (with_value(("bias",), [0.5]), "a list of 192 numbers"),
        (with_value(("weight",), []), "a list of 144 rows"),
        (with_value(("latent_channels",), CHANNELS + 1), "the set's 16"),
        (with_value(("scale",), 16), "scale is not from 1 to 8"),
        (with_value(("scale",), 4), "a list of 48 numbers"),
        (with_value(("format",), [2, 0]), "another version"),
        (lambda: b" " * (previews.RGB_MAX_BYTES + 1), "more than a latent-to-RGB map"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    preview_set: Path, data: Callable[[], bytes], match: str
) -> None:
    replace_listed(preview_set, "rgb", data())
    refused(preview_set, match)


def saved(
    prompts: Any = ("a", "b"),
    *,
    width: int = WIDTH,
    counts: tuple[int, ...] = (4, 5),
    dtype: torch.dtype = torch.bfloat16,
    value: float = 1.0,
    key: str = "prompts",
) -> bytes:
    """A prompts' file as another program could write it."""
    tensors = {}
    for index, count in enumerate(counts):
        tensors[f"prompt_embeds.{index}"] = torch.full((count, width), value, dtype=dtype)
        tensors[f"prompt_mask.{index}"] = torch.ones(count, dtype=torch.bool)
    text = prompts if isinstance(prompts, str) else json.dumps(prompts)
    return safetensors.torch.save(tensors, metadata={key: text})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (saved(width=WIDTH + 1), "the shard set says"),
        (saved(dtype=torch.float32), "the shard set says"),
        (saved(value=float("inf")), "a NaN or an infinity"),
        (saved(counts=(4,)), "a prompt without an embedding"),
        (saved(counts=(4, 0)), "a prompt without an embedding"),
        (saved(counts=(4, 5, 6)), "missing or unknown"),
        (saved(key="captions"), "no prompts in the metadata"),
        (saved(prompts="[1, 2]"), "not a list of texts"),
        (saved(prompts="[]", counts=()), "not a list of texts"),
        (saved(prompts='{"a": 1}'), "not a list of texts"),
        (saved(prompts="no JSON"), "not valid JSON"),
        (saved(prompts=["x" * previews.PROMPTS_HEADER_MAX_BYTES, "b"]), "is not accepted"),
        (saved()[:-1], "offsets|hole|bytes"),
        (saved() + b"\0", "after the last tensor"),
        (b"\x80\x04K\x01.", "no safetensors file"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(preview_set: Path, data: bytes, match: str) -> None:
    replace_listed(preview_set, "previews", data)
    refused(preview_set, match)


def test_prompts_of_another_program_are_read(preview_set: Path) -> None:
    replace_listed(preview_set, "previews", saved())
    with ShardSet.open(preview_set) as shards:
        assert [len(prompt.prompt_embeds) for prompt in shards.preview_prompts()] == [4, 5]
    assert verify(preview_set, deep=True).ok


def test_metadata_that_is_no_text_is_refused(preview_set: Path) -> None:
    header = canonical_json({"__metadata__": {"prompts": ["a"]}})
    replace_listed(preview_set, "previews", len(header).to_bytes(8, "little") + header)
    refused(preview_set, "metadata is not text")


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    rgb = make_rgb()
    rgb.weight[3, 4] = np.nan
    with pytest.raises((ShardError, ValueError)):
        write_rgb(tmp_path, rgb)
    prompts = make_prompts()
    prompts[0].prompt_embeds[0, 0] = float("nan")
    with pytest.raises(ShardError, match="NaN"):
        write_previews(tmp_path, prompts)
    assert not list(tmp_path.glob("*-*"))


def test_the_map_is_read_without_torch(preview_set: Path) -> None:
    code = (
        "import sys; from qwen_lora.shards.reader import ShardSet; from qwen_lora.shards import *; "
        "from qwen_lora.shards import tools, verify; "
        f"set_ = ShardSet.open({str(preview_set)!r}); assert set_.rgb_map().scale == {SCALE}; "
        f"assert verify.verify({str(preview_set)!r}, deep=True).ok; "
        f"tools.info({str(preview_set)!r}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_file_is_named(preview_set: Path) -> None:
    name = load_manifest(preview_set)[0].rgb.name  # type: ignore[union-attr]
    (preview_set / name).unlink()
    refused(preview_set, f"{name} is missing")
