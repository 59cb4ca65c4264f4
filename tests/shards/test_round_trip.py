"""What was written is what is read: by this project, and by plain webdataset and safetensors."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors.torch
import torch
import webdataset

from qwen_lora.shards import tools
from qwen_lora.shards.manifest import load_manifest, read_sidecar
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import RecordShape
from qwen_lora.shards.safe import parse_tensor_header
from qwen_lora.shards.store import FolderStore
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import (
    adoptable_shards,
    predicted_record_bytes,
    sweep_temporaries,
    write_retired,
)

from .conftest import (
    CHANNELS,
    FINGERPRINT,
    SCALE,
    WIDTH,
    publish,
    sorted_samples,
    write_one,
    write_set,
)


# webdataset leaves the files it has read to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_and_safetensors_read_every_shard(shard_set: Path) -> None:
    """The 20 lines that somebody else would write."""
    urls = tools.shard_urls(shard_set)
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        facts = json.loads(sample["json"])
        tensors = safetensors.torch.load(sample["safetensors"])
        found[sample["__key__"]] = (facts, tensors)
    expected = {sample.sample_id: sample for sample in sorted_samples(9)}
    assert found.keys() == expected.keys()
    for name, (facts, tensors) in found.items():
        sample = expected[name]
        assert facts["captions"] == sample.meta.captions
        assert facts["bucket"] == list(sample.meta.bucket)
        assert tensors.keys() == sample.tensors.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == sample.tensors[key].dtype
            assert torch.equal(tensor, sample.tensors[key])
    gc.collect()


def test_reader_returns_what_was_written(shard_set: Path) -> None:
    expected = {sample.sample_id: sample for sample in sorted_samples(9)}
    with ShardSet.open(shard_set) as shards:
        assert len(shards) == 9
        assert set(shards.table.sample_id) == set(expected)
        for row, name in enumerate(shards.table.sample_id):
            sample = expected[name]
            record = shards.read(row)
            assert record.meta == sample.meta
            assert record.tensors.keys() == sample.tensors.keys()
            assert all(torch.equal(record.tensors[k], v) for k, v in sample.tensors.items())
            assert shards.table.tokens_of(row) == sample.token_counts
            assert tuple(shards.table.bucket[row]) == sample.meta.bucket
            assert shards.table.source_sha256[row] == sample.meta.source_sha256
        embeds, mask = shards.unconditional()
        assert embeds.shape == (5, WIDTH) and embeds.dtype == torch.bfloat16
        assert mask.shape == (5,) and bool(mask.all())


def test_only_the_asked_captions_are_decoded(shard_set: Path) -> None:
    with ShardSet.open(shard_set) as shards:
        row = next(row for row in range(9) if len(shards.table.tokens_of(row)) == 2)
        record = shards.read(row, captions=[1])
        assert set(record.tensors) == {"latents", "prompt_embeds.1", "prompt_mask.1"}
        assert set(shards.read(row, captions=[]).tensors) == {"latents"}


def test_threads_read_the_same(shard_set: Path) -> None:
    with ShardSet.open(shard_set) as shards, ThreadPoolExecutor(8) as pool:
        alone = [shards.read_bytes(row) for row in range(9)]
        together = list(pool.map(shards.read_bytes, list(range(9)) * 20))
        assert together == alone * 20


def test_predicted_bytes_are_exact(shard_set: Path) -> None:
    samples = {sample.sample_id: sample for sample in sorted_samples(9)}
    manifest, _ = load_manifest(shard_set)
    for entry in manifest.shards:
        begin = 0
        for row in read_sidecar(shard_set, entry).rows:
            sample = samples[row.sample_id]
            height, width = sample.meta.bucket
            shape = (CHANNELS, height // SCALE, width // SCALE)
            record = RecordShape(("latents",), shape, sample.token_counts, WIDTH)
            assert predicted_record_bytes(sample.meta, record.tensors()) == row.end - begin
            begin = row.end


def test_tar_headers_are_canonical(shard_set: Path) -> None:
    for path in shard_set.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.pax_headers) == ("", "", {})
        names = [member.name for member in members]
        assert names == sorted(names)


@pytest.mark.multiprocess
def test_bytes_do_not_depend_on_the_surroundings(tmp_path: Path) -> None:
    """Another folder, umask, time zone, locale and hash seed give the same files."""
    here = write_set(tmp_path / "here")
    there = tmp_path / "some where else"
    code = "import os; os.umask(0o077); from tests.shards.conftest import write_set; "
    code += f"from pathlib import Path; write_set(Path({str(there)!r}))"
    environment = os.environ | {
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": os.getcwd(),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    files = sorted(path.name for path in here.iterdir() if path.is_file())
    assert files == sorted(path.name for path in there.iterdir() if path.is_file())
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in files)


def test_info_list_and_verify(shard_set: Path) -> None:
    facts = tools.info(shard_set)
    assert facts["counts"]["samples"] == 9 and facts["shards"] == 3
    assert "9 of 9 images" in tools.format_info(facts)
    rows = list(tools.list_samples(shard_set))
    assert {row["source"] for row in rows} == {f"folder/{number}.png" for number in range(9)}
    report = verify(shard_set, deep=True)
    assert report.ok and report.samples == 9 and not report.notes


def test_a_shard_with_samples_that_nobody_wants_is_not_read(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older generation needs may be many gigabytes."""
    extra = write_one(shard_set, sorted_samples(3, first=50))
    listed = frozenset(entry.tar.name for entry in load_manifest(shard_set)[0].shards)
    opened: list[str] = []
    real = FolderStore.open_unlisted

    def watch(self: FolderStore, name: str, size: int) -> BinaryIO:
        opened.append(name)
        return real(self, name, size)

    monkeypatch.setattr(FolderStore, "open_unlisted", watch)
    ids = {sample.sample_id for sample in sorted_samples(3, first=50)}
    assert adoptable_shards(shard_set, FINGERPRINT, listed, set(sorted(ids)[1:])) == []
    assert opened == []
    assert len(adoptable_shards(shard_set, FINGERPRINT, listed, ids)) == 1
    assert opened == [extra.tar.name]


def test_an_unlisted_shard_is_adoptable_when_it_is_whole(shard_set: Path) -> None:
    listed = frozenset(entry.tar.name for entry in load_manifest(shard_set)[0].shards)
    assert adoptable_shards(shard_set, FINGERPRINT, listed) == []
    extra = write_one(shard_set, sorted_samples(2, first=50))
    found = adoptable_shards(shard_set, FINGERPRINT, listed)
    assert [entry for entry, _ in found] == [extra]
    ids = {sample.sample_id for sample in sorted_samples(2, first=50)}
    assert [entry for entry, _ in adoptable_shards(shard_set, FINGERPRINT, listed, ids)] == [extra]
    other = type(FINGERPRINT)("qwen-image", vae={"weights": ["x"]}, text={})
    assert adoptable_shards(shard_set, other, listed) == []
    assert verify(shard_set).notes  # told, but no problem
    tar = shard_set / extra.tar.name
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    assert adoptable_shards(shard_set, FINGERPRINT, listed) == []


def test_retired_samples_are_not_live(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    samples = sorted_samples(4)
    entry = write_one(folder, samples)
    retired = write_retired(folder, [samples[0].sample_id])
    publish(folder, [entry], retired=retired)
    with ShardSet.open(folder) as shards:
        assert list(shards.table.sample_id) == [sample.sample_id for sample in samples[1:]]
        assert shards.manifest.counts["retired"] == 1
    assert verify(folder, deep=True).ok


def test_a_pinned_generation_outlives_an_append(shard_set: Path) -> None:
    manifest, first = load_manifest(shard_set)
    extra = write_one(shard_set, sorted_samples(2, first=50))
    second = publish(shard_set, [*manifest.shards, extra], previous=first)
    assert second != first
    with ShardSet.open(shard_set) as new, ShardSet.open(shard_set, generation=first) as old:
        assert (len(new), len(old)) == (11, 9)
        assert new.manifest.previous == first


def test_a_failed_write_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    def failing():
        yield sorted_samples(1)[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_one(tmp_path, failing())  # type: ignore[arg-type]
    assert not list(tmp_path.glob("shard-*")) and not list((tmp_path / ".local").iterdir())
    (tmp_path / ".local" / "shard-part-left.tmp").write_bytes(b"half")
    assert sweep_temporaries(tmp_path) == 1


def test_our_header_parser_agrees_with_safetensors() -> None:
    tensors = sorted_samples(3)[1].tensors
    data = safetensors.torch.save(tensors)
    entries = parse_tensor_header(data, "test")
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        raw = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert data[entry.begin : entry.end] == raw
    assert io.BytesIO(data).getbuffer().nbytes == len(data)


def test_reading_imports_no_torch(shard_set: Path) -> None:
    code = (
        "import sys; from qwen_lora.shards import tools, verify; "
        f"assert verify.verify({str(shard_set)!r}, deep=True).ok; "
        f"tools.format_info(tools.info({str(shard_set)!r})); "
        f"list(tools.list_samples({str(shard_set)!r})); "
        "assert 'torch' not in sys.modules and 'webdataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
