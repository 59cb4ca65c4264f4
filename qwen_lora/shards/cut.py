"""How many samples make a shard: one rule for whoever writes shards."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHARD_BYTES = 128 << 20
MIN_SHARD_SAMPLES = 16
SHARDS_AIMED_AT = 64  # so that a small set still spreads over the ranks of a node or cluster
TAR_END_BYTES = 1_024 + 10_240  # at most: two empty blocks, then padding to 20 blocks


def shard_samples_limit(total: int) -> int:
    """max(16, ceil(total / 64))"""
    return max(MIN_SHARD_SAMPLES, -(-total // SHARDS_AIMED_AT))


def cut_by_size(
    sizes: Sequence[int], *, max_bytes: int, max_samples: int, frame_bytes: int = TAR_END_BYTES
) -> list[range]:
    """Positions of consecutive records, by their bytes in the tar, that share a shard.

    No shard exceeds `max_samples` or `max_bytes` (its frame included), but a single record larger
    than that gets a shard of its own.
    """
    cuts: list[range] = []
    begin, total = 0, frame_bytes
    for position, size in enumerate(sizes):
        full = position - begin >= max_samples or total + size > max_bytes
        if position > begin and full:
            cuts.append(range(begin, position))
            begin, total = position, frame_bytes
        total += size
    if begin < len(sizes):
        cuts.append(range(begin, len(sizes)))
    return cuts
