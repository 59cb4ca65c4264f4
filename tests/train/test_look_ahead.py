"""Remote sets in training: the same batches as from a folder, fetched before they are needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from random_sets import MakeSettings
from safetensors.torch import load_file
from written_sets import write_set

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.remote.store import RemoteStore
from qwen_lora.train.data import BatchLoader
from qwen_lora.train.look_ahead import LookAhead, RemoteFile, check_cache_holds
from qwen_lora.train.plan import BatchRule, PlanTable
from qwen_lora.train.run import train
from qwen_lora.train.timesteps import TimestepSampling
from tests.shards.fault_server import serve
from tests.shards.folder_remote import FolderRemote

SAMPLING = TimestepSampling(density="logit_normal", compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples in 24 shards."""
    return write_set(tmp_path_factory.mktemp("sets") / "set", 48, per_shard=2)


def open_remote(folder: Path, cache: Path, most_bytes: int = 1 << 30) -> ShardSet:
    return ShardSet.open(RemoteStore(FolderRemote(folder), ShardCache(cache, most_bytes)))


def make_loader(opened: ShardSet, shuffle: str, ahead: int = 1 << 30) -> BatchLoader:
    rule = BatchRule(2, 2, seed=5, caption_dropout_rate=0.2, shuffle=shuffle)  # type: ignore[arg-type]
    table = PlanTable.from_sets([opened])
    return BatchLoader([opened], table, rule, SAMPLING, download_ahead_bytes=ahead)


def tars_fetched(opened: ShardSet) -> list[str]:
    remote = opened.store.remote  # type: ignore[attr-defined]
    return [name for name, _ in remote.fetched if name.endswith(".tar")]


def fetching_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.endswith("-ahead")]


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("most_bytes", [1 << 30, 250_000])
def test_the_stream_is_that_of_a_folder(
    folder: Path, tmp_path: Path, shuffle: str, most_bytes: int
) -> None:
    """Also when the cache holds only a few shards."""
    with (
        ShardSet.open(folder) as local,
        open_remote(folder, tmp_path, most_bytes) as remote,
    ):
        plain = make_loader(local, shuffle).stream_epochs(0)
        ahead = make_loader(remote, shuffle, most_bytes // 2).stream_epochs(0)
        for (*step, ours), (*other, theirs) in islice(zip(ahead, plain, strict=False), 50):
            assert step == other
            for one, two in zip(ours, theirs, strict=True):
                if one is None or two is None:
                    assert one is two
                    continue
                assert one.sample_ids == two.sample_ids
                assert torch.equal(one.latents, two.latents)
                assert all(map(torch.equal, one.prompt_embeds, two.prompt_embeds))
        ahead.close()
        plain.close()
        fetched = tars_fetched(remote)
        if most_bytes == 1 << 30:
            assert sorted(fetched) == sorted(set(fetched)) and len(fetched) == 24
    assert not fetching_threads()


def test_files_come_before_they_are_needed(folder: Path, tmp_path: Path) -> None:
    with open_remote(folder, tmp_path) as remote:
        loader = make_loader(remote, "block")
        plan = loader.plan(0)
        needed = dict.fromkeys(
            remote.tar_of(visit.row).name
            for number in range(plan.micro_batches)
            for visit in plan.micro_batch(number).visits
        )
        stream = loader.stream_epochs(0)
        next(stream)
        deadline = time.monotonic() + 20
        while len(set(tars_fetched(remote))) < 24 and time.monotonic() < deadline:
            time.sleep(0.01)
        stream.close()
        fetched = tars_fetched(remote)
        # Four at once, and the reader beside them: nearly the order in which they are needed.
        places = [list(needed).index(name) for name in fetched]
        assert len(fetched) == 24
        assert all(abs(place - at) <= 10 for at, place in enumerate(places))


def test_no_more_is_fetched_than_allowed(folder: Path, tmp_path: Path) -> None:
    with open_remote(folder, tmp_path) as remote:
        entries = [entry.tar for entry in remote.manifest.shards]
        store = remote.store
        assert isinstance(store, RemoteStore)

        def work() -> Iterator[list[RemoteFile]]:
            for entry in entries:
                yield [(store, entry), (store, entry)]

        ahead = LookAhead(work(), 3 * entries[0].bytes)
        seen = []
        for number in range(0, 12, 4):
            wait_until_quiet(remote)
            seen.append(len(tars_fetched(remote)))
            ahead.advance(number)
        wait_until_quiet(remote)
        seen.append(len(tars_fetched(remote)))
        ahead.close()
    fetched = tars_fetched(remote)
    assert set(fetched) == {entry.name for entry in entries[: len(fetched)]}
    assert 3 <= seen[0] <= 4 and seen[0] + 1 <= seen[1] <= 6 and seen[-1] <= 13


def wait_until_quiet(opened: ShardSet) -> None:
    count = -1
    while count != len(tars_fetched(opened)):
        count = len(tars_fetched(opened))
        time.sleep(0.1)


def test_a_download_that_fails_is_said_by_the_reader(folder: Path, tmp_path: Path) -> None:
    with open_remote(folder, tmp_path) as remote:
        name = remote.manifest.shards[7].tar.name
        far = remote.store.remote  # type: ignore[attr-defined]
        far.faults[name] = [lambda rest: bytes(len(rest))] * 100
        with pytest.raises(QwenLoraError, match=f"{name}: 3 times sha256"):
            list(make_loader(remote, "full").stream(0))
    assert not fetching_threads()


def test_closing_does_not_wait_for_downloads(folder: Path, tmp_path: Path) -> None:
    with open_remote(folder, tmp_path) as remote:
        stream = make_loader(remote, "full").stream_epochs(0)
        next(stream)
        remote.store.remote.may_go.clear()  # type: ignore[attr-defined]
        before = time.monotonic()
        stream.close()
        assert time.monotonic() - before < 5
    assert not fetching_threads()


def test_a_cache_that_is_too_small(folder: Path, tmp_path: Path) -> None:
    with ShardSet.open(folder) as local, open_remote(folder, tmp_path) as remote:
        total = sum(e.tar.bytes + e.sidecar.bytes for e in remote.manifest.shards)
        largest = max(e.tar.bytes for e in remote.manifest.shards)
        check_cache_holds([local, remote], "full", 16, total)
        check_cache_holds([local], "full", 16, 1)
        with pytest.raises(InputError, match="set `shuffle: block`.*or `shard_cache_gib: 0.1`"):
            check_cache_holds([local, remote], "full", 16, total - 1)
        check_cache_holds([remote], "block", 4, 8 * largest)
        with pytest.raises(InputError, match="less than two blocks of 4 shards need"):
            check_cache_holds([remote], "block", 4, 8 * largest - 1)


def test_training_from_a_url_gives_the_same_lora(
    make_settings: MakeSettings, train_shards: Path, tmp_path: Path
) -> None:
    """An interrupted run goes on from the same URL; what was downloaded is not asked for again."""
    local = train(make_settings("local", max_train_steps=8))
    with serve(train_shards) as server:
        server.script = ["503", "cut", "reset", "fine", "cut", "flipped", "no-range"]
        common: dict[str, Any] = {
            "shards": [server.url],
            "shard_cache_dir": tmp_path / "cache",
            "checkpointing_steps": 4,
        }
        train(make_settings("remote", max_train_steps=4, **common))
        asked = {path for path, _ in server.log}
        before = len(server.log)
        remote = train(make_settings("remote", max_train_steps=8, **common))
        again = {path for path, _ in server.log[before:]}
    assert remote.resumed_from == 4
    ours, theirs = load_file(remote.lora), load_file(local.lora)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(path.endswith(".tar") for path in asked)
    assert again and all("manifest" in path for path in again)


def test_full_shuffle_through_a_small_cache_is_refused(
    make_settings: MakeSettings, train_shards: Path, tmp_path: Path
) -> None:
    with serve(train_shards) as server:
        settings = make_settings(
            shards=[server.url], shard_cache_dir=tmp_path / "cache", shard_cache_gib=1e-6
        )
        with pytest.raises(InputError, match="set `shuffle: block`"):
            train(settings)
