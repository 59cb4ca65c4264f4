"""Sets that earlier releases wrote: every version of the format stays readable to the bit.

Each folder of `golden` is one set of one format version: two generations, two shards, a retired
sample, preview prompts and a latent-to-RGB map. `<version>-expected.json` says what it holds.
Nothing there may ever change; a new version of the format adds a folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset

from qwen_lora.shards.format import FORMAT_MAJOR, FORMAT_MINOR
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def expected(version: str) -> dict[str, Any]:
    """Per generation: records, unconditional embedding, prompts, map and fingerprint."""
    value: dict[str, Any] = json.loads((GOLDEN / f"{version}-expected.json").read_bytes())
    return value


def bits(tensor: torch.Tensor) -> list[Any]:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    return [kind, list(tensor.shape), hashlib.sha256(data).hexdigest()]


def plain(value: Any) -> Any:
    """As JSON has it: tuples are lists."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_read_to_the_bit(version: str) -> None:
    folder, newest = GOLDEN / version, ShardSet.open(GOLDEN / version).generation
    assert newest in expected(version)
    for generation, facts in expected(version).items():
        with ShardSet.open(folder, generation=generation) as shards:
            found = {}
            for row in range(len(shards)):
                record = shards.read(row)
                tensors = {name: bits(tensor) for name, tensor in record.tensors.items()}
                found[shards.table.sample_id[row]] = {"meta": asdict(record.meta)} | {
                    "tensors": tensors
                }
            assert plain(found) == facts["records"]
            embeds, mask = shards.unconditional()
            assert bits(embeds)[1:] == facts["unconditional"] and bool(mask.all())
            assert [prompt.prompt for prompt in shards.preview_prompts()] == facts["prompts"]
            rgb = shards.rgb_map()
            assert rgb is not None
            assert [rgb.scale, hashlib.sha256(rgb.weight.tobytes()).hexdigest()] == facts["rgb"]
            assert shards.manifest.fingerprint.hash == facts["fingerprint"]


@pytest.mark.parametrize("version", VERSIONS)
def test_it_verifies(version: str) -> None:
    report = verify(GOLDEN / version, deep=True)
    assert report.problems == [] and report.notes == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset's files
@pytest.mark.parametrize("version", VERSIONS)
def test_plain_webdataset_reads_it(version: str) -> None:
    records = {
        key: value
        for facts in expected(version).values()
        for key, value in facts["records"].items()
    }
    urls = sorted(str(path) for path in (GOLDEN / version).glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        tensors = safetensors.torch.load(sample["safetensors"])
        found[sample["__key__"]] = {
            "meta": json.loads(sample["json"]),
            "tensors": {name: bits(tensor) for name, tensor in tensors.items()},
        }
    assert found == records


def test_the_present_version_is_among_them() -> None:
    assert f"{FORMAT_MAJOR}.{FORMAT_MINOR}" in VERSIONS
