"""The samples that a run trains on, as numpy columns in sample-id order, from one or several sets.

Rows are sorted by sample id, so nothing that is computed from a table depends on how shards or sets
are named, ordered or merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwen_lora.config.kohya import parse_kohya
from qwen_lora.errors import InputError
from qwen_lora.train.randomness import Purpose, Words, sample_words, uniform

if TYPE_CHECKING:
    from qwen_lora.shards.reader import ShardSet


@dataclass(frozen=True)
class PlanTable:
    """N samples, sorted by sample id."""

    words: Words  # [N, 2] the 128 bits of each sample id
    bucket: NDArray[np.int32]  # [N, 2] pixels, [height, width]
    weight: NDArray[np.float64]  # [N] visits an epoch, > 0
    token_offsets: NDArray[np.int64]  # [N + 1] into token_counts
    token_counts: NDArray[np.int32]  # one per caption of each sample
    unconditional_tokens: NDArray[np.int32]  # [sets] length of the empty prompt's embedding
    set_index: NDArray[np.int32]  # [N] which set holds the record
    set_row: NDArray[np.int64]  # [N] its row there
    shard_key: Words  # [N] 64 bits that name the record's shard by its content
    duplicates: int = 0  # records left out because an earlier set has the same sample

    def __len__(self) -> int:
        return len(self.words)

    def sample_id(self, row: int) -> str:
        hi, lo = self.words[row]
        return f"{int(hi):016x}{int(lo):016x}"

    @classmethod
    def from_sets(
        cls,
        sets: Sequence[ShardSet],
        set_weights: Sequence[float] | None = None,
        group_weights: Mapping[str, float] | None = None,
        exclude_sources: frozenset[str] = frozenset(),
        *,
        only_sources: frozenset[str] | None = None,
        kohya_repeats: bool = False,
    ) -> PlanTable:
        """Gather the live samples of `sets`.

        A sample's weight is its set's weight times its group's; a sample in several sets counts
        once, in the first. `exclude_sources` (source sha256s) are held out for validation;
        `only_sources` keeps nothing else. `kohya_repeats` reads the weight of groups like `10_cat`
        from their names, unless group_weights gives one.
        Raises InputError for weights that are not numbers >= 0, for weights of groups that no set
        has, for sets of different families or widths, and when no sample is left.
        """
        set_weights = [1.0] * len(sets) if set_weights is None else set_weights
        _check_sets(sets, set_weights)
        group_weight = _group_weights(sets, dict(group_weights or {}), kohya_repeats)
        parts = [
            _columns(index, shard_set, base, group_weight, exclude_sources, only_sources)
            for index, (shard_set, base) in enumerate(zip(sets, set_weights, strict=True))
        ]
        unconditional = [int(shard_set.unconditional()[0].shape[0]) for shard_set in sets]
        return _join(parts, np.array(unconditional, np.int32))

    def visits_before(
        self, seed: int, epoch: int, rows: slice | NDArray[np.int64] = slice(None)
    ) -> NDArray[np.int64]:
        """How often each sample was visited in all epochs before `epoch`.

        floor(w) * epoch + floor(frac(w) * epoch + h), with h in [0, 1) by hash of (seed, sample):
        every epoch has floor(w) visits, and one more with probability frac(w) over the hash. The
        extra visits of one sample are spread evenly over the epochs, and the count needs no loop.
        """
        words, weight = self.words[rows], self.weight[rows]
        whole = np.floor(weight)
        start = uniform(seed, words[:, 0], words[:, 1], Purpose.VISITS)
        extra = np.floor((weight - whole) * epoch + start)
        return (whole * epoch + extra).astype(np.int64)


def _check_sets(sets: Sequence[ShardSet], set_weights: Sequence[float]) -> None:
    if not sets:
        raise InputError("no shard set was given; name one or set shards_dir")
    if len(sets) != len(set_weights):
        raise InputError(f"{len(sets)} shard sets but {len(set_weights)} weights; give one each")
    for weight in set_weights:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"shards: weight {weight} is not a number above 0")
    first = sets[0].manifest
    for shard_set in sets[1:]:
        other = shard_set.manifest
        for what, ours, theirs in (
            ("family", first.fingerprint.family, other.fingerprint.family),
            ("latent channels", first.latent_channels, other.latent_channels),
            ("text width", first.text_width, other.text_width),
        ):
            if ours != theirs:
                raise InputError(
                    f"the shard sets cannot be trained together: {what} {ours} and {theirs}"
                )


def _group_weights(
    sets: Sequence[ShardSet], given: dict[str, float], kohya_repeats: bool
) -> dict[str, float]:
    """The weight of every group that the sets hold, by its name in the shards."""
    for name, weight in given.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"data_config.group_weights: {name}: {weight} is not a number >= 0")
    weights: dict[str, float] = {}
    used: set[str] = set()
    for group in sorted(set().union(*(set(shard_set.table.group) for shard_set in sets))):
        weight, names = 1.0, [group]
        if kohya_repeats:
            parsed = parse_kohya(group)
            if parsed is not None:
                weight, names = float(parsed[0]), [group, parsed[1]]
        named = next((name for name in names if name in given), None)
        if named is not None:
            weight = given[named]
            used.add(named)
        weights[group] = weight
    if unknown := sorted(set(given) - used):
        known = ", ".join(repr(group) for group in sorted(weights))
        raise InputError(
            f"data_config.group_weights names {unknown[0]!r}, which no shard set has; "
            f"groups (first folders) there: {known}"
        )
    return weights


@dataclass(frozen=True)
class _Columns:
    words: Words
    bucket: NDArray[np.int32]
    weight: NDArray[np.float64]
    captions: NDArray[np.int64]  # [n] captions of each sample
    token_counts: NDArray[np.int32]
    set_index: NDArray[np.int32]
    set_row: NDArray[np.int64]
    shard_key: Words


def _columns(
    index: int,
    shard_set: ShardSet,
    set_weight: float,
    group_weight: Mapping[str, float],
    exclude_sources: frozenset[str],
    only_sources: frozenset[str] | None,
) -> _Columns:
    """The wanted rows of one set, in its own order."""
    table = shard_set.table
    total = len(table.sample_id)
    weight = set_weight * np.fromiter(map(group_weight.__getitem__, table.group), np.float64, total)
    keep = weight > 0
    if exclude_sources:
        held = (source in exclude_sources for source in table.source_sha256)
        keep &= ~np.fromiter(held, np.bool_, total)
    if only_sources is not None:
        wanted = (source in only_sources for source in table.source_sha256)
        keep &= np.fromiter(wanted, np.bool_, total)
    rows = np.flatnonzero(keep)
    offsets = np.asarray(table.token_offsets, np.int64)
    shard_keys = [int(entry.tar.sha256[:16], 16) for entry in shard_set.manifest.shards]
    return _Columns(
        words=sample_words(table.sample_id)[rows],
        bucket=np.asarray(table.bucket, np.int32).reshape(-1, 2)[rows],
        weight=weight[rows],
        captions=np.diff(offsets)[rows],
        token_counts=_ragged(table.token_counts, offsets, rows),
        set_index=np.full(len(rows), index, np.int32),
        set_row=rows.astype(np.int64),
        shard_key=np.array(shard_keys, np.uint64)[np.asarray(table.shard)[rows]],
    )


def _join(parts: Sequence[_Columns], unconditional_tokens: NDArray[np.int32]) -> PlanTable:
    """Concatenate, sort by sample id, keep the first of each."""
    words = np.concatenate([part.words for part in parts])
    order = np.argsort(words[:, 0], kind="stable")  # earlier sets first
    halves = words[order, 0]
    if (halves[1:] == halves[:-1]).any():  # rarely, but then the other half decides
        order = np.lexsort((words[:, 1], words[:, 0]))
    in_order = words[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    rows = order[first]
    if len(rows) == 0:
        raise InputError(
            "no sample to train on: the shard sets are empty, every group has weight 0, or all "
            "images are held out for validation"
        )
    captions = np.concatenate([part.captions for part in parts])
    counts = np.concatenate([part.token_counts for part in parts])
    return PlanTable(
        words=in_order[first],
        bucket=np.concatenate([part.bucket for part in parts])[rows],
        weight=np.concatenate([part.weight for part in parts])[rows],
        token_offsets=_offsets(captions[rows]),
        token_counts=_ragged(counts, _offsets(captions), rows),
        unconditional_tokens=unconditional_tokens,
        set_index=np.concatenate([part.set_index for part in parts])[rows],
        set_row=np.concatenate([part.set_row for part in parts])[rows],
        shard_key=np.concatenate([part.shard_key for part in parts])[rows],
        duplicates=len(order) - len(rows),
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ragged(
    values: NDArray[np.int32], offsets: NDArray[np.int64], rows: NDArray[np.intp]
) -> NDArray[np.int32]:
    """The values of `rows`, in that order, of a ragged column."""
    lengths = np.diff(offsets)[rows]
    starts = _offsets(lengths)[:-1]
    index = np.repeat(offsets[:-1][rows] - starts, lengths) + np.arange(lengths.sum())
    chosen: NDArray[np.int32] = np.asarray(values, np.int32)[index]
    return chosen
