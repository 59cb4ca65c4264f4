# ruff: noqa: TID253
"""Captions of one shard to stored embeddings: unique, sorted, in fixed batches."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qwen_lora.errors import QwenLoraError
from qwen_lora.families.base import PromptEncoder
from qwen_lora.hashing import hash_json
from qwen_lora.posix import write_atomic
from qwen_lora.precompute.fingerprint import EMBEDS_DTYPE
from qwen_lora.precompute.previews import PromptPlan
from qwen_lora.precompute.types import WorkItem
from qwen_lora.precompute.worklist import encoded_captions
from qwen_lora.shards.format import text_id
from qwen_lora.shards.previews import PreviewPrompt

TEMPORARY_PREFIX = "texts-"


@dataclass(frozen=True)
class Caption:
    text_id: str
    text: str
    tokens: int


@dataclass(frozen=True)
class StoredText:
    """An embedding as the shards hold it."""

    prompt_embeds: torch.Tensor  # [T, D] bf16, CPU
    prompt_mask: torch.Tensor  # [T] bool, CPU

    def finite(self) -> bool:
        return bool(torch.isfinite(self.prompt_embeds).all())


Texts = Mapping[str, StoredText]  # by text id


def caption_batches(
    items: Iterable[WorkItem], batch_size: int, stored: Container[str] = ()
) -> list[list[Caption]]:
    """The unique captions of a shard by (token count, text id), cut into batches of `batch_size`;
    without those whose text id is in `stored`.

    A function of the shard's plan alone: it holds whichever images turn out to be unusable.
    """
    unique = {
        text: Caption(text, caption, tokens)
        for item in items
        for text, caption, tokens in zip(
            item.text_ids,
            encoded_captions(item.inspection.candidate),
            item.token_counts,
            strict=True,
        )
        if text not in stored
    }
    return cut_batches(unique.values(), batch_size)


def cut_batches(captions: Iterable[Caption], batch_size: int) -> list[list[Caption]]:
    ordered = sorted(captions, key=lambda caption: (caption.tokens, caption.text_id))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def encode_captions(
    encoder: PromptEncoder,
    batches: Iterable[list[Caption]],
    between: Callable[[], None] = lambda: None,
) -> dict[str, StoredText]:
    """One forward pass a batch; `between` is called before each.

    Raises QwenLoraError when an embedding's length is not what the tokenizer promised.
    """
    texts = {}
    for batch in batches:
        between()
        encoded = encoder.encode([caption.text for caption in batch])
        for caption, result in zip(batch, encoded, strict=True):
            if len(result.prompt_embeds) != caption.tokens:
                raise QwenLoraError(
                    f"caption {caption.text[:40]!r}: {caption.tokens} tokens were counted, "
                    f"{len(result.prompt_embeds)} encoded; tokenizer and text encoder differ"
                )
            texts[caption.text_id] = StoredText(
                result.prompt_embeds.to(getattr(torch, EMBEDS_DTYPE)).contiguous(),
                result.prompt_mask.contiguous(),
            )
    return texts


def encode_prompts(
    encoder: PromptEncoder,
    prompts: PromptPlan,
    text_fingerprint: str,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> list[PreviewPrompt]:
    """Preview prompts, in their order; encoded as captions are, in batches of their own.

    Raises QwenLoraError for an embedding that is not finite.
    """
    captions = [Caption(text_id(text, text_fingerprint), text, count) for text, count in prompts]
    texts = encode_captions(encoder, cut_batches(captions, batch_size), between)
    for caption in captions:
        if not texts[caption.text_id].finite():
            raise QwenLoraError(
                f"the embedding of the preview prompt {caption.text[:40]!r} is not finite; take it "
                "out of preview_prompts"
            )
    return [
        PreviewPrompt(
            caption.text, texts[caption.text_id].prompt_embeds, texts[caption.text_id].prompt_mask
        )
        for caption in captions
    ]


class TextStore:
    """Embeddings of whole shards in SHARDS/.local between the two encoders of a sequential run.

    A file's name is the hash of its batches, since an embedding's last bits may depend on the
    captions it was encoded with; text ids include the encoder's fingerprint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, batches: list[list[Caption]]) -> Path:
        name = hash_json([[caption.text_id for caption in batch] for batch in batches])
        return self._folder / f"{TEMPORARY_PREFIX}{name[:32]}.safetensors"

    def put(self, batches: list[list[Caption]], texts: Texts) -> None:
        tensors = {}
        for name, text in texts.items():
            tensors[f"{name}.embeds"] = text.prompt_embeds
            tensors[f"{name}.mask"] = text.prompt_mask
        write_atomic(self.path(batches), save(tensors))

    def get(self, batches: list[list[Caption]]) -> dict[str, StoredText] | None:
        """None when there is no whole file for exactly these batches."""
        try:
            tensors = load_file(self.path(batches))
        except (OSError, SafetensorError):
            return None
        names = [caption.text_id for batch in batches for caption in batch]
        if {f"{name}.embeds" for name in names} - tensors.keys():
            return None
        return {
            name: StoredText(tensors[f"{name}.embeds"], tensors[f"{name}.mask"]) for name in names
        }

    def drop(self, batches: list[list[Caption]]) -> None:
        self.path(batches).unlink(missing_ok=True)

    def clear(self) -> None:
        for file in self._folder.glob(f"{TEMPORARY_PREFIX}*.safetensors"):
            file.unlink(missing_ok=True)
