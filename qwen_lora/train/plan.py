"""Which samples meet in which micro-batch and step of an epoch.

A plan is a pure function of (live samples, seed, epoch, batch rule). Ranks never choose samples;
they only share out the micro-batches of a step, so 1, 2, 4 or 8 ranks run the same steps.

    visits -> caption and dropout drawn -> grouped by bucket and text length -> cut into
    micro-batches -> micro-batches shuffled -> cut into steps
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen_lora.hashing import canonical_json
from qwen_lora.train.randomness import Purpose, Words, mix64, uniform
from qwen_lora.train.table import PlanTable

__all__ = [
    "UNCONDITIONAL",
    "BatchRule",
    "EpochPlan",
    "MicroBatch",
    "PlanTable",
    "Visit",
    "plan_epoch",
    "plan_id",
    "share",
]

UNCONDITIONAL = -1  # in place of a caption's index: the empty prompt
LENGTH_CLASS_TOKENS = 64  # samples of one micro-batch differ by about this much text
BLOCK_SHARDS = 16  # shards shuffled together with shuffle: block

T = TypeVar("T")


@dataclass(frozen=True)
class BatchRule:
    """What the plan depends on besides the samples."""

    train_batch_size: int  # most samples of one forward pass on one device
    micro_batches_per_step: int  # gradient accumulation x ranks
    seed: int
    caption_dropout_rate: float = 0.0
    shuffle: Literal["full", "block"] = "full"
    batch_pixels: int = 0  # a bucket gets more samples a pass while they have no more pixels

    def sizes(self, bucket: NDArray[np.int32]) -> NDArray[np.int64]:
        """Most samples of a forward pass in each of some buckets, [K, 2] pixels -> [K]."""
        pixels: NDArray[np.int64] = bucket[:, 0].astype(np.int64) * bucket[:, 1]
        return np.maximum(self.batch_pixels // pixels, self.train_batch_size)


@dataclass(frozen=True)
class Visit:
    """One sample trained on once."""

    row: int  # in the PlanTable
    visit: int  # 0, 1, ... when the sample's weight gives it several in one epoch
    caption: int  # index of the caption, or UNCONDITIONAL


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees: samples of one bucket."""

    visits: tuple[Visit, ...]
    bucket: tuple[int, int]  # pixels, [height, width]


@dataclass(frozen=True)
class EpochPlan:
    """V visits in the order they run, cut into M micro-batches."""

    epoch: int
    micro_batches_per_step: int
    row: NDArray[np.int64]  # [V] in the PlanTable
    visit: NDArray[np.int64]  # [V]
    caption: NDArray[np.int64]  # [V] index or UNCONDITIONAL
    words: Words  # [V, 2] sample ids, for the hash
    starts: NDArray[np.int64]  # [M + 1] micro-batch m is visits starts[m] : starts[m + 1]
    bucket: NDArray[np.int32]  # [M, 2]

    @property
    def micro_batches(self) -> int:
        return len(self.starts) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps of this epoch; 0 when fractional weights give it no visit at all."""
        return -(-self.micro_batches // self.micro_batches_per_step)

    def micro_batch(self, index: int) -> MicroBatch:
        visits = slice(int(self.starts[index]), int(self.starts[index + 1]))
        columns = (self.row[visits], self.visit[visits], self.caption[visits])
        height, width = self.bucket[index]
        return MicroBatch(
            visits=tuple(
                Visit(*facts) for facts in zip(*(c.tolist() for c in columns), strict=True)
            ),
            bucket=(int(height), int(width)),
        )

    def step(self, index: int) -> list[MicroBatch]:
        """The micro-batches of one step; only the last step of an epoch may have fewer."""
        if not 0 <= index < self.steps:
            raise IndexError(f"step {index} of an epoch with {self.steps}")
        first = index * self.micro_batches_per_step
        last = min(first + self.micro_batches_per_step, self.micro_batches)
        return [self.micro_batch(number) for number in range(first, last)]

    def samples(self, index: int) -> int:
        """How many visits a step has, over all ranks."""
        first = index * self.micro_batches_per_step
        last = min(first + self.micro_batches_per_step, self.micro_batches)
        return int(self.starts[last] - self.starts[first])

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of what runs in which order; ranks compare it before the first step."""
        digest = hashlib.sha256(canonical_json([self.epoch, self.micro_batches_per_step]))
        for column in (self.words, self.visit, self.caption, self.starts, self.bucket):
            digest.update(_little_endian(column))
        return digest.hexdigest()


def plan_epoch(table: PlanTable, rule: BatchRule, epoch: int) -> EpochPlan:
    """Plan one epoch: each visit exactly once, micro-batches inside a bucket, steps of equal size.

    The order is by hash of (seed, epoch, sample id, visit), so samples that join or leave do not
    change the order of the others. Inside a bucket, visits are sorted by class of text length, then
    hash; the classes' edges and the place of the smaller micro-batch move from epoch to epoch, so
    the same samples do not always meet.
    """
    row, visit = _visits(table, rule.seed, epoch)
    hi, lo = table.words[row, 0], table.words[row, 1]
    counter = visit.astype(np.uint64)
    key = mix64(rule.seed, epoch, hi, lo, counter, Purpose.ORDER)
    caption, tokens = _captions(table, rule, epoch, row, counter)
    block = _blocks(table, rule, epoch)[row]
    bucket = table.bucket[row]

    length = _length_class(rule.seed, epoch, bucket, tokens)
    size = bucket[:, 0].astype(np.int64) << 32 | bucket[:, 1]
    keys = (key, length, size, block) if rule.shuffle == "block" else (key, length, size)
    order = np.lexsort(keys)
    sizes = _cut(rule, epoch, bucket[order], block[order])
    starts = np.cumsum(sizes) - sizes
    order, sizes = _shuffle(rule.seed, epoch, key[order], block[order], order, starts, sizes)

    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    row = row[order]
    return EpochPlan(
        epoch=epoch,
        micro_batches_per_step=rule.micro_batches_per_step,
        row=row,
        visit=visit[order],
        caption=caption[order],
        words=table.words[row],
        starts=starts,
        bucket=table.bucket[row[starts[:-1]]],
    )


def plan_id(table: PlanTable, rule: BatchRule) -> str:
    """sha256 (hex) of everything that a plan is made of: live sample ids with buckets, token counts
    and weights, and the batch rule. Equal ids mean equal plans of every epoch."""
    facts = asdict(rule)
    if not rule.batch_pixels:
        del facts["batch_pixels"]  # the id of runs that are older than it
    digest = hashlib.sha256(canonical_json(facts))
    unconditional = table.unconditional_tokens[table.set_index]
    columns: list[NDArray[np.generic]] = [
        table.words,
        table.bucket,
        table.weight,
        np.diff(table.token_offsets),
        table.token_counts,
        unconditional,
    ]
    if rule.shuffle == "block":
        columns.append(table.shard_key)
    for column in columns:
        digest.update(_little_endian(column))
    return digest.hexdigest()


def share(step_batches: Sequence[T], rank: int, world: int) -> list[T | None]:
    """The part of a step that one rank runs: every `world`-th, from the `rank`-th on.

    All ranks get equally many; where a step has too few, the last one is None: the rank runs some
    micro-batch with weight zero, so that collective operations stay in step. The j-th entry of a
    rank is number `j * world + rank` of the step.
    """
    each = -(-len(step_batches) // world)
    mine: list[T | None] = list(step_batches[rank::world])
    return mine + [None] * (each - len(mine))


def _visits(table: PlanTable, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and number within the epoch of every visit."""
    count = table.visits_before(seed, epoch + 1) - table.visits_before(seed, epoch)
    row = np.repeat(np.arange(len(table), dtype=np.int64), count)
    first = np.cumsum(count) - count
    return row, np.arange(len(row), dtype=np.int64) - np.repeat(first, count)


def _captions(
    table: PlanTable, rule: BatchRule, epoch: int, row: NDArray[np.int64], counter: Words
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which caption each visit sees (or UNCONDITIONAL), and its length in tokens."""
    hi, lo = table.words[row, 0], table.words[row, 1]
    captions = np.diff(table.token_offsets)[row]
    drawn = uniform(rule.seed, epoch, hi, lo, counter, Purpose.CAPTION)
    caption = np.floor(drawn * captions).astype(np.int64)
    drawn = uniform(rule.seed, epoch, hi, lo, counter, Purpose.CAPTION_DROPOUT)
    dropped = (drawn < rule.caption_dropout_rate) | (captions == 0)
    tokens = table.unconditional_tokens[table.set_index[row]].astype(np.int64)
    kept = np.flatnonzero(~dropped)
    tokens[kept] = table.token_counts[table.token_offsets[row[kept]] + caption[kept]]
    caption[dropped] = UNCONDITIONAL
    return caption, tokens


def _blocks(table: PlanTable, rule: BatchRule, epoch: int) -> NDArray[np.int64]:
    """The block each sample is shuffled in. [N]; all zero with shuffle: full.

    With shuffle: block, shards are ordered by hash of (seed, epoch, shard content), and each
    BLOCK_SHARDS neighbours are read and shuffled together.
    """
    if rule.shuffle == "full":
        return np.zeros(len(table), np.int64)
    shards, of_sample = np.unique(table.shard_key, return_inverse=True)
    order = np.argsort(mix64(rule.seed, epoch, shards, Purpose.BLOCK_ORDER), kind="stable")
    place = np.empty(len(shards), np.int64)
    place[order] = np.arange(len(shards))
    blocks: NDArray[np.int64] = (place // BLOCK_SHARDS)[of_sample.reshape(-1)]
    return blocks


def _length_class(
    seed: int, epoch: int, bucket: NDArray[np.int32], tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Text lengths in classes whose edges are drawn for each epoch and bucket."""
    phase = _bucket_hash(seed, epoch, bucket, Purpose.LENGTH_PHASE) % np.uint64(LENGTH_CLASS_TOKENS)
    classes: NDArray[np.int64] = (tokens + phase.astype(np.int64)) // LENGTH_CLASS_TOKENS
    return classes


def _cut(
    rule: BatchRule, epoch: int, bucket: NDArray[np.int32], block: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Micro-batch sizes for visits that are sorted by block and bucket.

    Each bucket of a block gives full micro-batches and at most one smaller one, at a place drawn by
    hash.
    """
    if len(block) == 0:
        return np.zeros(0, np.int64)
    change = (bucket[1:] != bucket[:-1]).any(axis=1) | (block[1:] != block[:-1])
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(change) + 1])
    samples = np.diff(starts, append=len(block))
    size = rule.sizes(bucket[starts])
    batches = -(-samples // size)
    sizes = np.repeat(size, batches)
    drawn = _bucket_hash(rule.seed, epoch, bucket[starts], Purpose.REMAINDER)
    drawn = mix64(drawn, block[starts].astype(np.uint64))
    place = np.cumsum(batches) - batches + (drawn % batches.astype(np.uint64)).astype(np.int64)
    remainder = samples % size
    sizes[place[remainder > 0]] = remainder[remainder > 0]
    return sizes


def _shuffle(
    seed: int,
    epoch: int,
    key: Words,
    block: NDArray[np.int64],
    order: NDArray[np.intp],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Order the micro-batches by hash, inside their blocks; returns visits and sizes anew.

    A micro-batch is named by the smallest key of its visits, mixed once more: the smallest of
    several keys tends to be small, which would put the larger micro-batches first.
    """
    if len(sizes) == 0:
        return order, sizes
    name = np.minimum.reduceat(key, starts)
    place = mix64(seed, epoch, name, Purpose.MICRO_BATCH_ORDER)
    shuffled = np.lexsort((place, block[starts]))
    sizes = sizes[shuffled]
    moved = np.repeat(starts[shuffled] - (np.cumsum(sizes) - sizes), sizes)
    return order[moved + np.arange(len(order))], sizes


def _bucket_hash(seed: int, epoch: int, bucket: NDArray[np.int32], purpose: Purpose) -> Words:
    sides = bucket.astype(np.uint64)
    return mix64(seed, epoch, sides[:, 0], sides[:, 1], purpose)


def _little_endian(column: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).tobytes()
