"""The shard sets of a run, opened at one generation each, the same on every rank. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_lora.config.names import SECTION
from qwen_lora.config.recipe import check_against_manifest
from qwen_lora.config.schema import Settings, ShardSource
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards.format import Manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.train.look_ahead import check_cache_holds
from qwen_lora.train.plan import BLOCK_SHARDS

if TYPE_CHECKING:
    from qwen_lora.train.ranks import Ranks


@dataclass(frozen=True)
class Sources:
    """Open shard sets with their weights."""

    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...]

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return tuple(shard_set.manifest for shard_set in self.sets)

    @property
    def generations(self) -> tuple[str, ...]:
        return tuple(shard_set.generation for shard_set in self.sets)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return tuple(manifest.fingerprint.hash for manifest in self.manifests)


@contextmanager
def open_sources(
    ranks: Ranks, settings: Settings, pinned: Sequence[str] | None
) -> Iterator[Sources]:
    """Open every shard set at the generation that rank 0 found, or at the `pinned` ones of a
    resumed run. A pinned generation that is gone is replaced by the newest with a note; the plan id
    then decides whether the run can go on.

    Raises InputError for sets that do not exist, do not fit each other or contradict the settings.
    """
    chosen = settings.shards or [ShardSource(path=settings.shards_dir)]
    if pinned is not None and len(pinned) != len(chosen):
        raise InputError(
            f"this run was started with {len(pinned)} shard sets and now has {len(chosen)}; name "
            "the same ones, choose another --output, or start over with --restart"
        )
    cache = ShardCache.default(settings.shard_cache_dir, settings.shard_cache_gib)
    names = ranks.on_main(lambda: _generations(chosen, pinned, cache))
    with ExitStack() as stack:

        def open_all() -> tuple[ShardSet, ...]:
            sets = []
            for source, name in zip(chosen, names, strict=True):
                shard_set = ShardSet.open(source.path, generation=name, cache=cache)
                stack.callback(shard_set.close)
                sets.append(shard_set)
            return tuple(sets)

        sets = ranks.everywhere(open_all)
        sources = Sources(sets, tuple(source.weight for source in chosen))
        _check_alike(chosen, sources.manifests)
        given = {f"{SECTION}.{key}" for key in settings.data_config.model_fields_set}
        for source, manifest in zip(chosen, sources.manifests, strict=True):
            check_against_manifest(settings, given, manifest, name=str(source.path))
        check_cache_holds(sets, settings.shuffle, BLOCK_SHARDS, cache.most_bytes)
        yield sources


def model_name(settings: Settings, manifests: Sequence[Manifest]) -> str:
    """The transformer to train: the setting, or the hub id that the first shard set records."""
    if settings.pretrained_model_name_or_path is not None:
        return settings.pretrained_model_name_or_path
    recorded = manifests[0].model
    name, revision = str(recorded.get("id")), recorded.get("revision")
    if "/" not in name:
        raise InputError(
            f"the shards were made with a local model folder named {name!r}; say where the "
            "transformer is with --model"
        )
    return f"{name}@{revision}" if revision else name


def _generations(
    chosen: Sequence[ShardSource], pinned: Sequence[str] | None, cache: ShardCache
) -> list[str]:
    names = []
    for index, source in enumerate(chosen):
        wanted = pinned[index] if pinned is not None else None
        try:
            shard_set = ShardSet.open(source.path, generation=wanted, cache=cache)
        except QwenLoraError as error:
            if wanted is None:
                raise
            shard_set = ShardSet.open(source.path, cache=cache)
            print(
                f"warning: generation {wanted}, which this run started with, cannot be opened "
                f"({error}); trying the newest",
                file=sys.stderr,
            )
        names.append(shard_set.generation)
        shard_set.close()
    return names


def _check_alike(chosen: Sequence[ShardSource], manifests: Sequence[Manifest]) -> None:
    """Latents and embeddings of different encoders must not mix."""
    first = manifests[0].fingerprint
    for source, manifest in zip(chosen[1:], manifests[1:], strict=True):
        other = manifest.fingerprint
        if other.hash != first.hash:
            part = "VAE" if other.vae_hash != first.vae_hash else "text encoder"
            raise InputError(
                f"{source.path} was not made with the same {part} as {chosen[0].path}; train them "
                "apart, or precompute one of them again"
            )
