from __future__ import annotations

import numpy as np
import pytest

from qwen_lora.train.randomness import (
    Purpose,
    dropout_seed,
    mix64,
    mix_int,
    noise,
    sample_words,
    stratified_u,
    uniform,
)

ID = "00112233445566778899aabbccddeeff"

GOLDEN_MIX = [15020427595393229491, 16490336266968443936, 9537508092927057482]
GOLDEN_UNIFORM = 0.6540133728219998
GOLDEN_DROPOUT = 1763671538963119516
GOLDEN_U = [0.9088106760163676, 0.5268446647662623, 0.14487865351615725]
GOLDEN_NOISE = [0.1575424, -0.91402876, -0.06473346, -0.47959605, 0.04564202, -0.27100772]


def test_the_mixer_is_splitmix64() -> None:
    # First output of SplitMix64 from state 0, as its authors' reference implementation prints it.
    assert mix_int(0) == 0xE220A8397B1DCDAF


def test_golden_values() -> None:
    assert [mix_int(1, 2, 3), mix_int(2**64 - 1), mix_int(7, Purpose.NOISE)] == GOLDEN_MIX
    assert uniform(5, 6)[0] == GOLDEN_UNIFORM
    assert dropout_seed(1, 2, 3) == GOLDEN_DROPOUT
    assert [stratified_u(1, ID, count) for count in range(3)] == GOLDEN_U
    np.testing.assert_array_equal(
        noise(1, 2, ID, 3, (2, 3)), np.array(GOLDEN_NOISE, np.float32).reshape(2, 3)
    )


def test_arrays_mix_like_integers() -> None:
    words = np.arange(100, dtype=np.uint64)
    expected = [mix_int(9, value, 4) for value in range(100)]
    assert mix64(9, words, 4).tolist() == expected
    assert len(set(expected)) == 100
    assert mix_int(1, 2) != mix_int(2, 1)
    assert mix_int(0) != mix_int(0, 0)


def test_every_argument_matters() -> None:
    base = (1, 2, ID, 3, (4,), Purpose.NOISE)
    changed = [
        (9, 2, ID, 3, (4,), Purpose.NOISE),
        (1, 9, ID, 3, (4,), Purpose.NOISE),
        (1, 2, ID[::-1], 3, (4,), Purpose.NOISE),
        (1, 2, ID, 9, (4,), Purpose.NOISE),
        (1, 2, ID, 3, (4,), Purpose.POSTERIOR),
    ]
    first = noise(*base)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, noise(*base))
    for other in changed:
        assert not np.array_equal(first, noise(*other)), other


def test_uniform_is_uniform() -> None:
    values = np.sort(uniform(3, np.arange(20_000, dtype=np.uint64)))
    assert 0 <= values[0] and values[-1] < 1
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) has probability 0.001
    distance = np.abs(values - (np.arange(20_000) + 0.5) / 20_000).max()
    assert distance < 1.95 / np.sqrt(20_000)


def test_noise_is_standard_normal() -> None:
    values = noise(0, 0, ID, 0, (16, 64, 64))
    assert values.mean() == pytest.approx(0, abs=0.02)
    assert values.std() == pytest.approx(1, abs=0.02)


def test_stratified_u_covers_the_levels_of_one_sample_evenly() -> None:
    for sample in range(20):
        values = np.sort([stratified_u(0, f"{sample:032x}", count) for count in range(64)])
        gaps = np.diff(np.append(values, values[0] + 1))
        # The golden ratio's gaps take at most three lengths, none over phi^2 / n or so;
        # independent draws leave gaps of about ln(n) / n = 4.2 / n.
        assert gaps.max() < 2.7 / 64
        assert gaps.min() > 0.35 / 64
    starts = np.sort([stratified_u(0, f"{sample:032x}", 0) for sample in range(2000)])
    assert np.abs(starts - (np.arange(2000) + 0.5) / 2000).max() < 1.95 / np.sqrt(2000)


def test_sample_words() -> None:
    words = sample_words([ID, "f" * 32])
    assert words.tolist() == [
        [0x0011223344556677, 0x8899AABBCCDDEEFF],
        [2**64 - 1, 2**64 - 1],
    ]
    for wrong in ("", "0" * 31, "g" * 32, "0" * 30 + "  "):
        with pytest.raises(ValueError):
            sample_words([wrong])


def test_dropout_seeds_suit_torch() -> None:
    seeds = {dropout_seed(0, step, batch) for step in range(50) for batch in range(8)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
