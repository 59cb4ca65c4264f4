"""Counter-based randomness: every random number is a pure function of what it is for.

Nothing here has state, so nothing needs saving, ranks and threads cannot disturb each other, and a
resumed run draws what an unbroken one would have drawn. A number is named by (seed, epoch, sample
id, visit, purpose); integers come from a 64-bit mixer, normals from numpy's Philox keyed by it.

The mixer folds its words with the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014): h <- finalise((h ^ word) + 0x9E3779B97F4A7C15), from h = 0.
For fixed other words it is a bijection of each word, so distinct samples never share a value of one
purpose. It is not a cryptographic hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from qwen_lora.shards.table import HexColumn

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a number is for; the values are part of what makes runs repeatable, never renumber."""

    ORDER = 1  # position of a visit in its epoch
    VISITS = 2  # which epochs give a fractional weight its extra visit
    CAPTION = 3  # which caption of a sample
    CAPTION_DROPOUT = 4
    LENGTH_PHASE = 5  # where the text-length classes of a bucket begin
    REMAINDER = 6  # which micro-batch of a bucket is the small one
    MICRO_BATCH_ORDER = 7
    BLOCK_ORDER = 8  # order of shards with shuffle: block
    NOISE = 9
    POSTERIOR = 10
    TIMESTEP = 11
    LORA_DROPOUT = 12
    LORA_INIT = 13
    VALIDATION_SPLIT = 14
    VALIDATION_NOISE = 15


def mix64(*words: int | Words) -> Words:
    """Mix integers and uint64 arrays (broadcast together) into uint64 values, at least 1-d."""
    state = np.zeros(1, np.uint64)
    for word in words:
        if not isinstance(word, np.ndarray):
            word = np.array([int(word) & _MASK], np.uint64)
        state = _finalise((state ^ word) + np.uint64(_GOLDEN))
    return state


def mix_int(*words: int) -> int:
    """`mix64` of plain integers, as a plain integer."""
    state = 0  # numpy's arithmetic on arrays of one takes ten times as long
    for word in words:
        state = ((state ^ (int(word) & _MASK)) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MULTIPLIER_1) & _MASK
        state = ((state ^ (state >> 27)) * _MULTIPLIER_2) & _MASK
        state ^= state >> 31
    return state


def uniform(*words: int | Words) -> NDArray[np.float64]:
    """float64 in [0, 1) with 53 random bits."""
    return _unit(mix64(*words))


def sample_words(sample_ids: Sequence[str]) -> Words:
    """The 128 bits of each sample id (32 hex digits) as two words. [N, 2] uint64.

    Raises ValueError for anything that is not 32 hex digits.
    """
    if isinstance(sample_ids, HexColumn) and sample_ids.data.shape[1] == 16:
        words = np.ascontiguousarray(sample_ids.data).view(">u8")
        return words.astype(np.uint64).reshape(-1, 2)
    if any(len(sample_id) != 32 for sample_id in sample_ids):
        raise ValueError("a sample id is 32 hex digits")
    data = bytes.fromhex("".join(sample_ids))
    if len(data) != 16 * len(sample_ids):  # fromhex skips white space
        raise ValueError("a sample id is 32 hex digits")
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _words_of(sample_id: str) -> tuple[int, int]:
    """`sample_words` of one."""
    hi, lo = sample_words([sample_id])[0].tolist()
    return hi, lo


def noise(
    seed: int,
    epoch: int,
    sample_id: str,
    visit: int,
    shape: tuple[int, ...],
    purpose: Purpose = Purpose.NOISE,
) -> NDArray[np.float32]:
    """Standard normal float32 values of `shape` for one visit of one sample.

    numpy's Philox on the host rather than torch's generator: torch's CPU normals differ between
    instruction sets, and device generators between devices.
    """
    hi, lo = _words_of(sample_id)
    key = [mix_int(seed, epoch, hi, lo, visit, purpose, half) for half in (0, 1)]
    generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32)


def stratified_u(seed: int, sample_id: str, visit_count: int) -> float:
    """The sample's `visit_count`-th number in [0, 1) for its noise level.

    frac(hash(seed, sample id) + visit_count * 0.618...), in 64-bit fixed point: additive recurrence
    by the golden ratio (Kronecker sequence), so few visits of one sample already cover the noise
    levels evenly, while different samples are independent.
    """
    hi, lo = _words_of(sample_id)
    start = mix_int(seed, hi, lo, Purpose.TIMESTEP)
    return (((start + visit_count * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed for torch's generator before one forward pass; 63 bits, which every device takes.

    `micro_batch` is the index in the whole step, not in a rank's share of it.
    """
    return mix_int(seed, step, micro_batch, Purpose.LORA_DROPOUT) >> 1


def _finalise(state: Words) -> Words:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return state ^ (state >> np.uint64(31))


def _unit(values: Words) -> NDArray[np.float64]:
    return (values >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)
