"""What a hash alone does not promise: the canonical tar. And what the writer refuses to publish."""

from __future__ import annotations

import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qwen_lora.shards.reader as reader_module
from qwen_lora.errors import ShardError
from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import FileEntry, ShardEntry, sample_id, text_id
from qwen_lora.shards.manifest import content_name, load_manifest, read_sidecar
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import encode_record
from qwen_lora.shards.safe import JSON_MEMBER_MAX_BYTES
from qwen_lora.shards.sidecar import encode_sidecar
from qwen_lora.shards.store import FolderStore
from qwen_lora.shards.tar import BLOCK, TAR_RECORD, canonical_header
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import (
    EncodedSample,
    adoptable_shards,
    build_manifest,
    publish_manifest,
    write_shard,
)

from .conftest import (
    CHANNELS,
    FINGERPRINT,
    SCALE,
    WIDTH,
    make_sample,
    publish,
    sorted_samples,
    write_one,
)


def header_with(**changes: object) -> Callable[[bytearray, int], None]:
    """Another valid header, right checksum and all, in front of the first member."""

    def change(data: bytearray, _: int) -> None:
        info = tarfile.TarInfo.frombuf(bytes(data[:BLOCK]), "ascii", "strict")
        for name, value in changes.items():
            setattr(info, name, value)
        data[:BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)

    return change


def padding(data: bytearray, size: int) -> None:
    data[BLOCK + size] = 1


def behind_the_end(data: bytearray, _: int) -> None:
    data[-1] = 1


def another_record(data: bytearray, _: int) -> None:
    data += bytes(TAR_RECORD)


def hidden_member(data: bytearray, _: int) -> None:
    """A pickle behind the end: other readers of the same bytes would see it with ignore_zeros."""
    block = canonical_header("0" * 32 + ".pickle", 3) + b"abc".ljust(BLOCK, b"\0")
    data[-len(block) :] = block


@pytest.mark.parametrize(
    "change",
    [
        header_with(mtime=1),
        header_with(uid=1000),
        header_with(mode=0o755),
        header_with(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        header_with(name="../" + "0" * 32 + ".json"),
        padding,
        behind_the_end,
        another_record,
        hidden_member,
    ],
)
def test_tars_that_are_not_canonical_are_found(
    tmp_path: Path, change: Callable[[bytearray, int], None]
) -> None:
    """The whole chain of hashes is right here, down to the members."""
    folder = tmp_path
    entry = write_one(folder, sorted_samples(2))
    sidecar = read_sidecar(folder, entry)
    data = bytearray((folder / entry.tar.name).read_bytes())
    for file in (entry.tar, entry.sidecar):
        (folder / file.name).unlink()
    change(data, sidecar.rows[0].json.bytes)
    forged = forge_shard(folder, bytes(data), encode_sidecar(sidecar))
    assert adoptable_shards(folder, FINGERPRINT) == []
    publish(folder, [forged])
    assert [problem for problem in verify(folder).problems if forged.tar.name in problem]


def forge_shard(folder: Path, tar: bytes, sidecar: bytes) -> ShardEntry:
    sha256 = sha256_hex(tar)
    names = content_name("shard", sha256, ".tar"), content_name("shard", sha256, ".json")
    (folder / names[0]).write_bytes(tar)
    (folder / names[1]).write_bytes(sidecar)
    return ShardEntry(
        FileEntry(names[0], len(tar), sha256),
        FileEntry(names[1], len(sidecar), sha256_hex(sidecar)),
        2,
    )


@pytest.mark.parametrize("field", ["latents", "prompt_embeds.0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written(field: str, value: float) -> None:
    sample = make_sample(1)
    sample.tensors[field].view(-1)[3] = value
    with pytest.raises(ShardError, match="folder/1.png.*NaN or an infinity"):
        encode_record(sample.meta, sample.tensors)


def test_records_that_a_reader_would_refuse_are_not_written() -> None:
    sample = make_sample(1)
    long = replace(sample.meta, captions=["x" * JSON_MEMBER_MAX_BYTES])
    with pytest.raises(ShardError, match="shorten its captions"):
        encode_record(long, sample.tensors)
    with pytest.raises(ShardError, match="latents is F32"):
        encode_record(sample.meta, {"latents": torch.zeros(1, 2, 2)})
    many = {f"prompt_mask.{index}": torch.ones(1, dtype=torch.bool) for index in range(2000)}
    with pytest.raises(ShardError, match="header of"):
        encode_record(sample.meta, many)


def test_samples_out_of_order_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ShardError):
        write_one(tmp_path, sorted_samples(3)[::-1])
    with pytest.raises(ValueError, match="at least one sample"):
        write_one(tmp_path, [])
    assert [path.name for path in tmp_path.rglob("*")] == [".local"]


def test_a_published_sidecar_is_never_replaced_by_other_versions(tmp_path: Path) -> None:
    """An older generation lists it by its hash; `made_by` alone is no reason to break that."""
    samples = sorted_samples(2)
    first = write_shard(tmp_path, samples, FINGERPRINT, {"torch": "1"})
    assert write_shard(tmp_path, samples, FINGERPRINT, {"torch": "2"}) == first
    assert json.loads((tmp_path / first.sidecar.name).read_bytes())["made_by"] == {"torch": "1"}
    (tmp_path / first.sidecar.name).write_bytes(b"broken")
    assert write_shard(tmp_path, samples, FINGERPRINT, {"torch": "1"}) == first
    publish(tmp_path, [first])
    assert verify(tmp_path).ok


def test_a_sample_in_two_shards_names_both(tmp_path: Path) -> None:
    samples = sorted_samples(4)
    entries = [write_one(tmp_path, samples[:3]), write_one(tmp_path, samples[2:])]
    publish(tmp_path, entries)
    with pytest.raises(ShardError) as caught:
        ShardSet.open(tmp_path)
    for text in (samples[2].sample_id, *(entry.tar.name for entry in entries)):
        assert text in str(caught.value)
        assert any(text in problem for problem in verify(tmp_path).problems)


def test_posteriors_and_records_without_text_round_trip(tmp_path: Path) -> None:
    """`posterior_mean` and `posterior_std`; captions and source names left out."""
    sample = make_sample(1)
    tensors = dict(sample.tensors)
    tensors["posterior_mean"] = tensors.pop("latents")
    tensors["posterior_std"] = tensors["posterior_mean"].abs()
    hidden = replace(sample, meta=replace(sample.meta, captions=None, source=None), tensors=tensors)
    entry = write_one(tmp_path, [hidden])
    assert [found for found, _ in adoptable_shards(tmp_path, FINGERPRINT)] == [entry]
    unconditional = load_unconditional(tmp_path, entry)
    manifest = build_manifest(
        tmp_path,
        shards=[entry],
        fingerprint=FINGERPRINT,
        latent_channels=CHANNELS,
        latent_scale=SCALE,
        text_width=WIDTH,
        posterior="mean_std",
        model={},
        recipe={},
        unconditional=unconditional,
    )
    publish_manifest(tmp_path, manifest)
    assert verify(tmp_path, deep=True).ok
    with ShardSet.open(tmp_path) as shards:
        record = shards.read(0, captions=[0])
    assert record.meta == hidden.meta
    assert set(record.tensors) == {
        *("posterior_mean", "posterior_std", "prompt_embeds.0", "prompt_mask.0")
    }
    assert torch.equal(record.tensors["posterior_std"], tensors["posterior_std"])


def load_unconditional(folder: Path, entry: ShardEntry) -> FileEntry:
    publish(folder, [entry])
    return load_manifest(folder)[0].unconditional


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderStore, "open_files", 2)
    samples = sorted_samples(6)
    publish(tmp_path, [write_one(tmp_path, [sample]) for sample in samples])
    with ShardSet.open(tmp_path) as shards:
        most = 0
        for row in [*range(6), 5, 0, 3]:
            shards.read_bytes(row)
            most = max(most, len(shards._files._open))
        assert most == 2


def test_closing_waits_for_no_reader_and_pulls_no_file_from_under_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, [write_one(tmp_path, sorted_samples(2))])
    shards = ShardSet.open(tmp_path)
    expected = shards.read_bytes(0)[0]
    reading, closed = threading.Event(), threading.Event()
    read_at = reader_module._read_at

    def slow(descriptor: int, offset: int, size: int) -> bytes:
        reading.set()
        assert closed.wait(20)
        return read_at(descriptor, offset, size)

    monkeypatch.setattr(reader_module, "_read_at", slow)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(shards._member(0, 0)))
    thread.start()
    assert reading.wait(20)
    shards.close()
    closed.set()
    thread.join(20)
    assert found == [expected]
    assert not shards._files._open
    with pytest.raises(ValueError, match="was closed"):
        shards.read_bytes(0)


def test_bytes_do_not_depend_on_how_samples_come(tmp_path: Path) -> None:
    """A list, a generator, tensors that are views: the same shard."""
    samples = sorted_samples(3)

    def views() -> Iterator[EncodedSample]:
        for sample in samples:
            tensors = {
                name: torch.stack([tensor, tensor], dim=-1)[..., 0]
                for name, tensor in reversed(sample.tensors.items())
            }
            yield replace(sample, tensors=tensors)

    one = write_one(tmp_path, samples)
    assert write_shard(tmp_path, views(), FINGERPRINT, {"qwen_lora": "test"}) == one


def test_ids_are_those_of_the_format() -> None:
    """Spelt out once, from hashes of canonical JSON, so that they cannot drift."""
    sample = make_sample(1)
    source, box, bucket = sample.meta.source_sha256, [0, 0, 48, 96], [48, 96]
    vae = sha256_hex(b'[1,"qwen-image",{"weights":["a"]}]')
    text = sha256_hex(b'[1,"qwen-image",{"weights":["b"]}]')
    facts = json.dumps([source, [box, bucket, False], vae], separators=(",", ":"))
    latent = sha256_hex(facts.encode())
    captions = sample.meta.captions or []
    texts = [
        sha256_hex(json.dumps([caption, [], text], separators=(",", ":")).encode())
        for caption in captions
    ]
    joined = json.dumps([latent, texts], separators=(",", ":"))
    assert sample.latent_id == latent
    assert sample.text_ids == tuple(texts)
    assert sample.sample_id == sha256_hex(joined.encode())[:32]
    assert sample.sample_id == sample_id(latent, texts)
    assert text_id(captions[0], FINGERPRINT.text_hash) == texts[0]
