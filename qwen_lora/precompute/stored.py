"""What a set that is there already holds of the records that it lacks: latents and embeddings.

A new caption of an image that was encoded before needs no VAE, a new size of a captioned image no
text encoder. What is copied is what the generation at hand says, so a run's bytes follow from that
generation and its own work list, whether it was broken off or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qwen_lora.precompute.types import WorkItem
from qwen_lora.shards.format import ShardEntry
from qwen_lora.shards.manifest import load_manifest, read_sidecar
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.store import Store

if TYPE_CHECKING:
    import torch

    from qwen_lora.precompute.texts import StoredText


@dataclass(frozen=True)
class StoredParts:
    """Where a generation holds what planned records need; rows count its samples, retired ones
    too, in the order of its shards."""

    generation: str = ""  # file name of the manifest
    latents: Mapping[str, int] = field(default_factory=dict)  # latent id -> row
    texts: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # text id -> row, caption

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "latents": dict(self.latents),
            "texts": {name: list(place) for name, place in self.texts.items()},
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> StoredParts:
        texts = {name: (row, caption) for name, (row, caption) in facts["texts"].items()}
        return cls(facts["generation"], facts["latents"], texts)


def find_stored(
    store: Store, shards: Sequence[ShardEntry], generation: str, items: Iterable[WorkItem]
) -> StoredParts:
    """The first place of everything that `items` need; reads sidecars, and none without items."""
    wanted_latents: set[str] = set()
    wanted_texts: dict[str, int] = {}  # text id -> tokens that the tokenizer counts now
    for item in items:
        wanted_latents.add(item.latent_id)
        wanted_texts.update(zip(item.text_ids, item.token_counts, strict=True))
    latents: dict[str, int] = {}
    texts: dict[str, tuple[int, int]] = {}
    number = 0
    for entry in shards if wanted_latents else ():
        for row in read_sidecar(store, entry).rows:
            if row.latent_id in wanted_latents:
                latents.setdefault(row.latent_id, number)
            for caption, (text, tokens) in enumerate(
                zip(row.text_ids, row.token_counts, strict=True)
            ):
                if wanted_texts.get(text) == tokens:
                    texts.setdefault(text, (number, caption))
            number += 1
    return StoredParts(generation, latents, texts)


class StoredReader:
    """Reads stored parts, every byte checked; the set is opened at the first read."""

    def __init__(self, store: Store, parts: StoredParts) -> None:
        self._store, self._parts = store, parts
        self._open: ShardSet | None = None

    def latent(self, latent_id: str) -> dict[str, torch.Tensor]:
        """The tensors of a latent as stored, by name: [C, h, w] float16. Raises ShardError."""
        row = self._parts.latents[latent_id]
        return self._set().read(row, captions=[]).tensors

    def text(self, text_id: str) -> StoredText:
        """prompt_embeds [T, D] bfloat16 and prompt_mask [T] bool. Raises ShardError."""
        from qwen_lora.precompute.texts import StoredText

        row, caption = self._parts.texts[text_id]
        tensors = self._set().read(row, captions=[caption]).tensors
        return StoredText(tensors[f"prompt_embeds.{caption}"], tensors[f"prompt_mask.{caption}"])

    def _set(self) -> ShardSet:
        if self._open is None:
            manifest, name = load_manifest(self._store, self._parts.generation)
            # A retired record's tensors are as good as a live one's.
            everything = replace(manifest, retired=None)
            self._open = ShardSet.of_manifest(self._store, everything, name)
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.close_files()
