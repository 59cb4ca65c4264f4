"""Several sets become one, byte for byte; read back by plain webdataset too."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from qwen_lora.errors import InputError, ShardError
from qwen_lora.shards import reader
from qwen_lora.shards.format import Fingerprint
from qwen_lora.shards.manifest import load_manifest, read_retired, read_sidecar
from qwen_lora.shards.merge import merge
from qwen_lora.shards.tools import shard_urls
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import publish_manifest, write_retired

from .conftest import FINGERPRINT, make_sample, publish, sorted_samples, write_one

# webdataset leaves the files it has read to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KILL_POINTS = Path(__file__).with_name("kill_points.py")


def make_set(folder: Path, first: int, count: int, per_shard: int = 100, **changes: object) -> Path:
    """Samples first, first + 1, ... of the numbered ones."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = sorted_samples(count, first)
    cuts = [samples[start : start + per_shard] for start in range(0, count, per_shard)]
    publish(folder, [write_one(folder, cut) for cut in cuts], **changes)
    return folder


def change(folder: Path, **changes: object) -> str:
    """A new generation that differs in some fields."""
    manifest, generation = load_manifest(folder)
    return publish_manifest(folder, replace(manifest, previous=generation, **changes))


def members(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Live samples with the bytes of both members."""
    with reader.ShardSet.open(folder) as shards:
        pairs = (shards.read_bytes(row) for row in range(len(shards)))
        read = [(bytes(facts), bytes(tensors)) for facts, tensors in pairs]
        return dict(zip(shards.table.sample_id, read, strict=True))


def plain(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """The same, as plain webdataset reads it."""
    found = {
        sample["__key__"]: (sample["json"], sample["safetensors"])
        for sample in webdataset.WebDataset(shard_urls(folder), shardshuffle=False)
    }
    gc.collect()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_members_keep_their_bytes_and_duplicates_are_left_out(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", 0, 6, per_shard=2)
    b = make_set(tmp_path / "b", 4, 6, per_shard=5)
    report = merge([a, b], tmp_path / "c")
    assert (report.samples, report.added, report.duplicates, report.retired) == (10, 10, 2, 0)
    expected = {**members(b), **members(a)}
    assert members(tmp_path / "c") == expected
    assert plain(tmp_path / "c") == expected
    assert verify(tmp_path / "c", deep=True).problems == []
    manifest, _ = load_manifest(tmp_path / "c")
    assert len(manifest.shards) == 1  # small shards are put together
    assert manifest.previous is None
    assert manifest.unconditional == load_manifest(a)[0].unconditional


def test_tars_are_those_that_the_writer_makes(tmp_path: Path) -> None:
    """Records written anew lie as webdataset's own writer lays them out."""
    a = make_set(tmp_path / "a", 0, 5, per_shard=2)
    b = make_set(tmp_path / "b", 5, 6, per_shard=2)
    merge([a, b], tmp_path / "c")
    whole = make_set(tmp_path / "whole", 0, 11)
    assert files(tmp_path / "c") == files(whole)


def test_whole_shards_keep_their_names(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", 0, 20, per_shard=10)
    b = make_set(tmp_path / "b", 19, 12, per_shard=6)  # one of a's in its first or second shard
    report = merge([a, b], tmp_path / "c")
    kept = set(files(a)) & set(files(tmp_path / "c"))
    assert {name for name in files(a) if name.startswith("shard-")} <= kept
    assert (report.shards_copied, report.shards_written) == (2, 1)
    assert members(tmp_path / "c") == {**members(b), **members(a)}
    again = merge([a, b], tmp_path / "d")
    assert replace(again, output="") == replace(report, output="")
    assert files(tmp_path / "c") == files(tmp_path / "d")


def test_records_that_disagree_come_from_the_first_set(tmp_path: Path) -> None:
    """The same sample id with another source name: either is right, one is taken."""
    sample = make_sample(3)
    other = replace(sample, meta=replace(sample.meta, source="elsewhere/x.png"))
    for name, one in (("a", sample), ("b", other)):
        (tmp_path / name).mkdir()
        publish(tmp_path / name, [write_one(tmp_path / name, [one])])
    for order, source in (("ab", "folder/3.png"), ("ba", "elsewhere/x.png")):
        report = merge([tmp_path / name for name in order], tmp_path / order)
        assert (report.samples, report.duplicates) == (1, 1)
        facts = members(tmp_path / order)[sample.sample_id][0]
        assert json.loads(facts)["source"] == source


def test_retired_samples_stay_behind(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", 0, 4)
    gone = sorted(members(a))[1]
    publish(a, list(load_manifest(a)[0].shards), retired=write_retired(a, [gone]), previous=None)
    b = make_set(tmp_path / "b", 4, 2)
    report = merge([a, b], tmp_path / "c")
    assert (report.samples, report.retired) == (5, 1)
    assert gone not in plain(tmp_path / "c")
    assert load_manifest(tmp_path / "c")[0].counts["retired"] == 0


def test_stripping_takes_texts_out_and_leaves_tensors_alone(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", 0, 6, per_shard=3)
    report = merge([a], tmp_path / "c", strip=["captions", "source"])
    assert report.stripped == ["captions", "source"]
    before, after = members(a), members(tmp_path / "c")
    assert before.keys() == after.keys()
    for name, (facts, tensors) in after.items():
        old = json.loads(before[name][0])
        assert json.loads(facts) == {**old, "captions": None, "source": None}
        assert tensors == before[name][1]
    for data in files(tmp_path / "c").values():
        assert b"caption " not in data and b".png" not in data
    assert verify(tmp_path / "c", deep=True).problems == []
    recipe = load_manifest(tmp_path / "c")[0].recipe
    assert recipe == {"img_size": [64], "captions_in_shards": False, "source_names": False}
    with pytest.raises(InputError, match="captions_in_shards: False -> True.*--strip captions"):
        merge([make_set(tmp_path / "b", 6, 1)], tmp_path / "c")
    merge([tmp_path / "b"], tmp_path / "c", strip=["captions", "source"])
    assert len(members(tmp_path / "c")) == 7
    with pytest.raises(InputError, match="cannot strip faces"):
        merge([a], tmp_path / "d", strip=["faces"])


def test_appending_to_a_set_makes_a_generation(tmp_path: Path) -> None:
    c = make_set(tmp_path / "c", 0, 4)
    old, before = load_manifest(c)[1], files(c)
    b = make_set(tmp_path / "b", 2, 4)
    report = merge([b, c], c)  # the output itself is in it already
    assert (report.sets, report.samples, report.added, report.duplicates) == (1, 6, 2, 2)
    assert load_manifest(c)[0].previous == old
    after = files(c)
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert verify(c, deep=True).problems == []
    assert merge([b], c).generation == load_manifest(c)[1]
    assert files(c) == after  # nothing new: no generation


def test_a_sample_that_the_output_retired_lives_again(tmp_path: Path) -> None:
    c = make_set(tmp_path / "c", 0, 4)
    back, stays = sorted(members(c))[:2]
    publish(
        c,
        list(load_manifest(c)[0].shards),
        retired=write_retired(c, [back, stays]),
        previous=load_manifest(c)[1],
    )
    b = tmp_path / "b"
    b.mkdir()
    number = next(n for n in range(4) if make_sample(n).sample_id == back)
    publish(b, [write_one(b, [make_sample(number)])])
    report = merge([b], c)
    assert (report.restored, report.added, report.samples) == (1, 0, 3)
    assert read_retired(c, load_manifest(c)[0]) == {stays}


def test_other_encoders_or_rules_are_refused(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", 0, 2)
    other = Fingerprint("qwen-image", {"weights": ["z"]}, FINGERPRINT.text)
    b = make_set(tmp_path / "b", 2, 2)
    change(b, fingerprint=other, shards=())
    with pytest.raises(InputError, match=r"vae.weights: \['a'\] -> \['z'\]"):
        merge([a, b], tmp_path / "c")
    c = make_set(tmp_path / "flipped", 2, 2)
    change(c, recipe={"img_size": [64], "flip": True})
    with pytest.raises(InputError, match="flip: None -> True"):
        merge([a, c], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(InputError, match="no shard set"):
        merge([a, tmp_path / "nowhere"], tmp_path / "c")
    with pytest.raises(InputError, match="at least one other set"):
        merge([a], a)
    change(c, recipe={"img_size": [32, 64]})
    merge([a, c], tmp_path / "c")
    assert load_manifest(tmp_path / "c")[0].recipe == {"img_size": [32, 64]}


def test_a_damaged_source_is_not_copied(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", 0, 8)  # copied whole
    small = make_set(tmp_path / "small", 8, 2)  # written anew
    for folder in (a, small):
        tar = next(folder.glob("shard-*.tar"))
        sound = tar.read_bytes()
        for position in (10, 3000, len(sound) - 1):  # header, tensors, the end
            tar.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            if folder == small and position != 3000:
                continue  # what is written anew has headers and an end of its own
            with pytest.raises(ShardError, match=r"shard-.*copy the shard again"):
                merge([a, small], tmp_path / "c")
            assert not (tmp_path / "c" / "manifest.json").exists()
        tar.write_bytes(sound)
    merge([a, small], tmp_path / "c")
    assert len(members(tmp_path / "c")) == 10


def test_a_shard_that_only_the_manifest_says_otherwise_about_is_not_copied(tmp_path: Path) -> None:
    """Its sidecar fits; the manifest's hash of it ends differently than its name begins."""
    a = make_set(tmp_path / "a", 0, 8)
    manifest, _ = load_manifest(a)
    (entry,) = manifest.shards
    other = entry.tar.sha256[:-1] + ("0" if entry.tar.sha256[-1] != "0" else "1")
    shards = (replace(entry, tar=replace(entry.tar, sha256=other)),)
    publish_manifest(a, replace(manifest, shards=shards))
    with pytest.raises(ShardError, match=r"shard-.*is damaged: sha256"):
        merge([a], tmp_path / "c")
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_what_made_the_records_is_kept(tmp_path: Path) -> None:
    from qwen_lora.shards.writer import write_shard

    for name, number, device in (("a", 0, "cpu"), ("b", 1, "cuda"), ("c", 2, "cpu")):
        folder = tmp_path / name
        folder.mkdir()
        made_by = {"qwen_lora": "1", "device": device}
        publish(folder, [write_shard(folder, [make_sample(number)], FINGERPRINT, made_by)])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    merge([tmp_path / "ab", tmp_path / "c"], tmp_path / "abc")
    manifest, _ = load_manifest(tmp_path / "abc")
    sidecar = read_sidecar(tmp_path / "abc", manifest.shards[0])
    assert sidecar.made_by == {"qwen_lora": "1", "device": ["cpu", "cuda"]}


def test_killed_merges_leave_the_old_set_or_the_new_one(tmp_path: Path) -> None:
    make_set(tmp_path / "a", 0, 9, per_shard=8)
    make_set(tmp_path / "b", 7, 4)
    make_set(tmp_path / "old", 3, 2)
    result = subprocess.run(
        [sys.executable, KILL_POINTS, "merge", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_merging_needs_no_torch(tmp_path: Path) -> None:
    make_set(tmp_path / "a", 0, 2)
    code = (
        "import sys\nfrom qwen_lora.shards.merge import merge\n"
        f"merge([{str(tmp_path / 'a')!r}], {str(tmp_path / 'c')!r}, ['captions'])\n"
        "assert not {'torch', 'webdataset', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
