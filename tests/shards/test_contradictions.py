"""Each link of the chain on its own: a set whose hashes are right and whose facts disagree."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import qwen_lora.shards.writer as writer_module
from qwen_lora.errors import ShardError
from qwen_lora.shards.format import Fingerprint, sample_id
from qwen_lora.shards.merge import merge
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import encode_meta
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import adoptable_shards

from .conftest import FINGERPRINT, make_sample, publish, sorted_samples, write_one, write_set
from .test_hostile_sets import changed, publish_sidecar, publish_value


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A set of one shard, its manifest and its sidecar as values."""
    folder = write_set(tmp_path / "set", count=3, per_shard=3)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    sidecar = json.loads((folder / manifest["shards"][0]["sidecar"]["name"]).read_bytes())
    return folder, manifest, sidecar


Parts = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("bucket", [0, 64], "a number is not from 1"),
        ("bucket", [1 << 40, 64], "a number is not from 1"),
        ("bucket", [63, 64], "not a multiple of 8 pixels"),
        ("token_counts", [0], "a number is not from 1"),
        ("token_counts", [], "differ in number"),
        ("safetensors_offset", 99, "do not follow each other"),
        ("json_bytes", 1 << 19, "longer than the format allows"),
        ("json_bytes", 1 << 70, "not a sidecar"),
        ("sample_id", "f" * 32, "do not ascend"),
        ("latent_id", "F" * 64, "not 64 hex digits"),
        ("json_sha256", " " * 64, "non-hexadecimal|not 64 hex digits"),
        ("group", 7, "a group that is no text"),
    ],
)
def test_columns_that_make_no_sense_are_refused_at_open(
    parts: Parts, column: str, value: Any, message: str
) -> None:
    folder, manifest, sidecar = parts
    publish_sidecar(folder, manifest, changed(sidecar, ("columns", column, 0), value))
    with pytest.raises(ShardError, match=message):
        ShardSet.open(folder)
    assert not verify(folder).ok


def test_columns_of_unequal_lengths_are_refused(parts: Parts) -> None:
    folder, manifest, sidecar = parts
    for column, values in sidecar["columns"].items():
        publish_sidecar(folder, manifest, changed(sidecar, ("columns", column), values[:-1]))
        with pytest.raises(ShardError, match="not a sidecar of format 1"):
            ShardSet.open(folder)


def test_a_sidecar_for_a_tar_of_another_length_is_refused(tmp_path: Path) -> None:
    small, large = sorted_samples(1), sorted_samples(4, first=50)
    one, other = write_one(tmp_path, small), write_one(tmp_path, large)
    publish(tmp_path, [one])
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    sidecar = json.loads((tmp_path / other.sidecar.name).read_bytes())
    publish_sidecar(tmp_path, changed(manifest, ("shards", 0, "samples"), 4), sidecar)
    with pytest.raises(ShardError, match="4 samples that end at byte .* the manifest says"):
        ShardSet.open(tmp_path)
    assert not verify(tmp_path).ok


def test_a_wrong_number_of_samples_is_refused(parts: Parts) -> None:
    folder, manifest, _ = parts
    publish_value(folder, changed(manifest, ("shards", 0, "samples"), 2))
    with pytest.raises(ShardError, match="3 samples that end at .* says 2 samples"):
        ShardSet.open(folder)


def test_shards_of_other_encoders_are_refused_with_both_values(parts: Parts) -> None:
    folder, manifest, sidecar = parts
    other = asdict(Fingerprint("qwen-image", vae={"weights": ["z"]}, text={"weights": ["b"]}))
    publish_sidecar(folder, manifest, sidecar | {"fingerprint": other})
    with pytest.raises(ShardError, match=r"vae\.weights: \['a'\] -> \['z'\]"):
        ShardSet.open(folder)
    assert any("fingerprint" in problem for problem in verify(folder).problems)


def test_a_manifest_with_another_hash_of_a_tar_is_found(parts: Parts) -> None:
    folder, manifest, _ = parts
    sha256 = manifest["shards"][0]["tar"]["sha256"]
    forged = sha256[:12] + sha256[12:][::-1]
    publish_value(folder, changed(manifest, ("shards", 0, "tar", "sha256"), forged))
    assert any("is damaged: sha256" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("key", [("counts", "captions"), ("histograms", "groups", "folder")])
def test_counts_that_are_not_those_of_the_shards_are_found(
    parts: Parts, key: tuple[str, ...]
) -> None:
    folder, manifest, _ = parts
    publish_value(folder, changed(manifest, key, 77))
    assert verify(folder).problems == [
        "the manifest's counts or histograms are not those of its shards"
    ]


def test_a_sample_id_that_is_not_that_of_its_contents_is_found(parts: Parts) -> None:
    """Other text ids: the id no longer follows from them."""
    folder, manifest, sidecar = parts
    texts = sidecar["columns"]["text_ids"][0]
    forged = changed(sidecar, ("columns", "text_ids", 0), ["0" * 64] * len(texts))
    publish_sidecar(folder, manifest, forged)
    assert any("is not that of its contents" in problem for problem in verify(folder).problems)


def test_not_a_number_with_right_hashes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every read of it, and by verify --deep."""
    sample = sorted_samples(1)[0]
    sample.tensors["prompt_embeds.0"][1, 2] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(
            writer_module,
            "encode_record",
            lambda meta, tensors: (encode_meta(meta), safetensors.torch.save(tensors)),
        )
        publish(tmp_path, [write_one(tmp_path, [sample])])
    with ShardSet.open(tmp_path) as shards:
        with pytest.raises(ShardError, match=f"{sample.sample_id}.*NaN or an infinity"):
            shards.read(0)
        assert torch.isfinite(shards.read(0, captions=[]).tensors["latents"]).all()
    assert verify(tmp_path).ok
    problems = verify(tmp_path, deep=True).problems
    assert len(problems) == 1 and "NaN or an infinity" in problems[0]


def test_an_unknown_fingerprint_form_is_refused(parts: Parts) -> None:
    folder, manifest, _ = parts
    newer = asdict(FINGERPRINT) | {"format_major": 2}
    publish_value(folder, manifest | {"fingerprint": newer})
    with pytest.raises(ShardError, match="not a fingerprint"):
        ShardSet.open(folder)


def test_a_sample_that_stands_in_two_shards_is_found(tmp_path: Path) -> None:
    """Everything else is right, counts of rows included."""
    samples = sorted_samples(5)
    shards = [write_one(tmp_path, samples[:3]), write_one(tmp_path, samples[2:])]
    publish(tmp_path, shards)
    (problem,) = verify(tmp_path, deep=True).problems
    assert problem.startswith(f"sample {samples[2].sample_id} stands in shard-")
    with pytest.raises(ShardError, match=f"{samples[2].sample_id} stands in"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("forged", ["latent", "text"])
def test_an_id_of_something_else_is_found(forged: str, tmp_path: Path) -> None:
    """The sample id follows from them; they must follow from image, crop, caption and encoders."""
    sample = make_sample(0)
    latent = "f" * 64 if forged == "latent" else sample.latent_id
    texts = ("e" * 64,) if forged == "text" else sample.text_ids
    other = replace(
        sample, sample_id=sample_id(latent, list(texts)), latent_id=latent, text_ids=texts
    )
    entry = write_one(tmp_path, [other])
    assert adoptable_shards(tmp_path, FINGERPRINT) == []
    publish(tmp_path, [entry])
    (problem,) = verify(tmp_path).problems
    assert f"the {forged} id" in problem and other.sample_id in problem
    with pytest.raises(ShardError, match=f"the {forged} id"):
        merge([tmp_path], tmp_path / "merged")
