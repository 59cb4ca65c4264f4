"""Batches from real shard sets: what is in them, in which order, and how reading ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from written_sets import write_set

from qwen_lora.errors import QwenLoraError, ShardError
from qwen_lora.families import family_by_name
from qwen_lora.families.qwen_image.tokens import unpack
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.data import BatchLoader, LoadedBatch
from qwen_lora.train.plan import UNCONDITIONAL, BatchRule, PlanTable
from qwen_lora.train.randomness import Purpose, noise, stratified_u
from qwen_lora.train.timesteps import TimestepSampling

RULE = BatchRule(
    train_batch_size=3, micro_batches_per_step=2, seed=11, caption_dropout_rate=0.3, shuffle="full"
)
SAMPLING = TimestepSampling(density="logit_normal", compute_dtype=torch.bfloat16)
COUNT = 14


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardSet]:
    opened = ShardSet.open(write_set(tmp_path_factory.mktemp("sets") / "mode", COUNT))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def posterior_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardSet]:
    folder = tmp_path_factory.mktemp("sets") / "posterior"
    opened = ShardSet.open(write_set(folder, 6, posterior="mean_std"))
    yield opened
    opened.close()


def make_loader(
    *sets: ShardSet, rule: BatchRule = RULE, sampling: TimestepSampling = SAMPLING, **options
) -> BatchLoader:
    return BatchLoader(sets, PlanTable.from_sets(sets), rule, sampling, **options)


def tensors_of(batch: LoadedBatch) -> list[torch.Tensor]:
    return [batch.latents, batch.noise, batch.sigmas, *batch.prompt_embeds, *batch.prompt_masks]


def assert_same(one: LoadedBatch, two: LoadedBatch) -> None:
    assert one.sample_ids == two.sample_ids
    for ours, theirs in zip(tensors_of(one), tensors_of(two), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qwen-lora-read")]


def test_a_batch_holds_what_the_records_hold(shard_set: ShardSet) -> None:
    table = PlanTable.from_sets([shard_set])
    loader = BatchLoader([shard_set], table, RULE, SAMPLING)
    empty_embeds, empty_mask = shard_set.unconditional()
    plan = loader.plan(4)
    seen, dropped = [], 0
    for index in range(plan.micro_batches):
        micro_batch = plan.micro_batch(index)
        batch = loader.load(micro_batch, 4)
        height, width = micro_batch.bucket
        assert batch.size == len(micro_batch.visits)
        assert batch.latents.shape == (batch.size, 16, height // 8, width // 8)
        assert batch.latents.dtype == batch.noise.dtype == batch.sigmas.dtype == torch.float32
        for place, visit in enumerate(micro_batch.visits):
            name = table.sample_id(visit.row)
            assert batch.sample_ids[place] == name
            record = shard_set.read(shard_set.table.sample_id.index(name))
            assert torch.equal(batch.latents[place], record.tensors["latents"].float())
            embeds, mask = empty_embeds, empty_mask
            if visit.caption != UNCONDITIONAL:
                embeds = record.tensors[f"prompt_embeds.{visit.caption}"]
                mask = record.tensors[f"prompt_mask.{visit.caption}"]
            assert torch.equal(batch.prompt_embeds[place], embeds)
            assert torch.equal(batch.prompt_masks[place], mask)
            drawn = noise(RULE.seed, 4, name, visit.visit, tuple(batch.noise.shape[1:]))
            np.testing.assert_array_equal(batch.noise[place].numpy(), drawn)
            u = torch.tensor([stratified_u(RULE.seed, name, 4)])  # one visit an epoch before
            sigma = SAMPLING.sigmas(u, (height // 8, width // 8))[0]
            assert batch.sigmas[place] == sigma == sigma.bfloat16().float()
            seen.append(name)
            dropped += visit.caption == UNCONDITIONAL
    assert sorted(seen) == sorted(shard_set.table.sample_id)
    assert 0 < dropped < COUNT


def test_the_posterior_is_drawn_afresh_at_each_visit(posterior_set: ShardSet) -> None:
    loader = make_loader(posterior_set, rule=replace(RULE, train_batch_size=1))
    drawn: dict[str, list[torch.Tensor]] = {}
    for epoch in range(3):
        for _, batches in loader.stream(epoch):
            for batch in batches:
                name = batch.sample_ids[0]
                record = posterior_set.read(posterior_set.table.sample_id.index(name))
                mean = record.tensors["posterior_mean"].float()
                std = record.tensors["posterior_std"].float()
                shape = tuple(mean.shape)
                own = noise(RULE.seed, epoch, name, 0, shape, Purpose.POSTERIOR)
                expected = mean + std * torch.from_numpy(own)
                torch.testing.assert_close(batch.latents[0], expected, rtol=0, atol=0)
                assert not torch.equal(batch.noise[0], torch.from_numpy(own))
                drawn.setdefault(name, []).append(batch.latents[0])
    assert len(drawn) == 6
    for one, two, three in drawn.values():
        assert not torch.equal(one, two) and not torch.equal(two, three)


@pytest.mark.parametrize(("threads", "read_ahead"), [(1, 1), (2, 4), (8, 64)])
def test_threads_and_read_ahead_change_nothing(
    shard_set: ShardSet, threads: int, read_ahead: int
) -> None:
    plain = list(make_loader(shard_set, read_ahead=0).stream(1))
    ahead = list(make_loader(shard_set, read_ahead=read_ahead, threads=threads).stream(1))
    assert [step for step, _ in ahead] == [step for step, _ in plain] == list(range(len(plain)))
    for (_, ours), (_, theirs) in zip(ahead, plain, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert_same(one, two)
    assert not reading_threads()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_rank_sees(shard_set: ShardSet, world: int) -> None:
    rule = replace(RULE, micro_batches_per_step=4)
    whole = list(make_loader(shard_set, rule=rule).stream(0))
    parts = [
        list(make_loader(shard_set, rule=rule).stream(0, 0, rank, world)) for rank in range(world)
    ]
    for step, batches in whole:
        shares = [part[step][1] for part in parts]
        assert len({len(share) for share in shares}) == 1
        merged = [share[j] for j in range(len(shares[0])) for share in shares]
        assert all(batch is None for batch in merged[len(batches) :])
        for ours, theirs in zip(merged, batches, strict=False):
            assert_same(ours, theirs)
    # two buckets of 7 make 6 micro-batches: steps of 4 and 2
    idle = any(batch is None for part in parts for _, batches in part for batch in batches)
    assert idle == (world == 4)


def test_a_stream_starts_anywhere_and_crosses_epochs(shard_set: ShardSet) -> None:
    loader = make_loader(shard_set)
    steps = [loader.plan(epoch).steps for epoch in range(4)]
    expected = [(epoch, step) for epoch in range(1, 4) for step in range(steps[epoch])][1:]
    stream = loader.stream_epochs(1, 1)
    for epoch, step in expected:
        found_epoch, found_step, batches = next(stream)
        assert (found_epoch, found_step) == (epoch, step)
        wanted = loader.plan(epoch).step(step)
        for batch, micro_batch in zip(batches, wanted, strict=True):
            assert_same(batch, loader.load(micro_batch, epoch))
    stream.close()
    assert not reading_threads()


def test_repeated_visits_differ_in_noise_and_level(shard_set: ShardSet) -> None:
    table = PlanTable.from_sets([shard_set], [3.0])
    loader = BatchLoader([shard_set], table, RULE, SAMPLING)
    sigmas: dict[str, set[float]] = {}
    first_noise: dict[str, set[float]] = {}
    for epoch in range(2):
        for _, batches in loader.stream(epoch):
            for batch in batches:
                for place, name in enumerate(batch.sample_ids):
                    sigmas.setdefault(name, set()).add(float(batch.sigmas[place]))
                    first_noise.setdefault(name, set()).add(float(batch.noise[place, 0, 0, 0]))
    assert len(sigmas) == COUNT
    assert all(len(values) == 6 for values in first_noise.values())
    assert all(len(values) == 6 for values in sigmas.values())


def test_reading_ahead_is_bounded(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(shard_set, rule=replace(RULE, train_batch_size=1), read_ahead=3)
    started = []
    load = loader.load

    def counting(micro_batch, epoch):
        started.append(micro_batch)
        return load(micro_batch, epoch)

    monkeypatch.setattr(loader, "load", counting)
    stream = loader.stream(0)
    taken = 0
    for _, batches in stream:
        taken += len(batches)
        assert len(started) <= taken + 3
    assert len(started) == taken == COUNT


def test_a_damaged_record_is_an_error_in_the_consumer_in_order(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 8, per_shard=1)
    with_all = ShardSet.open(folder)
    loader = make_loader(with_all, rule=replace(RULE, train_batch_size=1), threads=4)
    order = [batch.sample_ids[0] for _, batches in loader.stream(0) for batch in batches]
    victim = order[5]
    shard = with_all.manifest.shards[with_all.table.shard[with_all.table.sample_id.index(victim)]]
    with_all.close()
    path = folder / shard.tar.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # inside the tensors
    path.chmod(0o644)
    path.write_bytes(data)

    damaged = ShardSet.open(folder)
    loader = make_loader(damaged, rule=replace(RULE, train_batch_size=1), threads=4)
    got = []
    with pytest.raises(ShardError, match=victim):
        for _, batches in loader.stream(0):
            got += [batch.sample_ids[0] for batch in batches]
    assert got == order[:4]  # whole steps of two before the damaged one
    assert not reading_threads()
    damaged.close()


def test_any_other_failure_names_the_sample(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(shard_set)

    def fail(*args, **kwargs):
        raise OSError("device gone")

    monkeypatch.setattr(shard_set, "read", fail)
    with pytest.raises(QwenLoraError, match=r"sample [0-9a-f]{32}: device gone") as caught:
        next(loader.stream(0))
    assert isinstance(caught.value.__cause__, OSError)
    assert not reading_threads()


def test_leaving_a_stream_early_ends_its_threads(shard_set: ShardSet) -> None:
    loader = make_loader(shard_set, read_ahead=2, threads=4)
    stream = loader.stream_epochs(0)
    next(stream)
    assert reading_threads()
    stream.close()
    assert not reading_threads()


def test_batches_move_between_devices_but_for_masks_and_noise_levels(shard_set: ShardSet) -> None:
    loader = make_loader(shard_set)
    _, batches = next(loader.stream(0))
    moved = batches[0].to("meta")
    tensors = [moved.latents, moved.noise, *moved.prompt_embeds]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in [moved.sigmas, *moved.prompt_masks]} == {"cpu"}
    assert moved.sample_ids == batches[0].sample_ids


def test_samples_are_noised_ahead_to_the_same_bits(shard_set: ShardSet) -> None:
    """In the compute dtype, as a step would round it; what they are made of stays on the host."""
    loader = make_loader(shard_set, tokens_for=family_by_name("qwen-image"))
    plain = make_loader(shard_set)
    for (_, batches), (_, others) in zip(loader.stream(0), plain.stream(0), strict=True):
        for batch, other in zip(batches, others, strict=True):
            assert_same(batch, other)
            assert batch.tokens.noised.dtype == torch.bfloat16
            height, width = batch.tokens.latent_size
            sigma = batch.sigmas.view(-1, 1, 1, 1)
            noised = (1 - sigma) * batch.latents + sigma * batch.noise
            assert torch.equal(unpack(batch.tokens.noised, height, width), noised.bfloat16())
            target = unpack(batch.tokens.target, height, width)
            assert torch.equal(target, batch.noise - batch.latents)
    moved = batch.to("meta")
    tensors = [moved.tokens.noised, moved.tokens.target, *moved.prompt_embeds]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in [moved.latents, moved.noise]} == {"cpu"}


def test_text_is_rounded_ahead_to_the_compute_dtype(shard_set: ShardSet) -> None:
    family, sampling = family_by_name("qwen-image"), TimestepSampling(compute_dtype=torch.float16)
    loader = make_loader(shard_set, sampling=sampling, tokens_for=family)
    _, batches = next(loader.stream(0))
    _, others = next(make_loader(shard_set, sampling=sampling).stream(0))
    for batch, other in zip(batches, others, strict=True):
        for ahead, stored in zip(batch.prompt_embeds, other.prompt_embeds, strict=True):
            assert (ahead.dtype, stored.dtype) == (torch.float16, torch.bfloat16)
            assert torch.equal(ahead, stored.to(torch.float16))
