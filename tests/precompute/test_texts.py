from pathlib import Path

import pytest
import torch

from qwen_lora.errors import QwenLoraError
from qwen_lora.families.base import EncodedCaption
from qwen_lora.precompute.texts import TextStore, caption_batches, encode_captions
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, WorkItem
from qwen_lora.shards.format import Geometry


def item(number: int, captions: dict[str, int]) -> WorkItem:
    """captions: text -> token count; the text stands for its id, too"""
    name = f"{number}.png"
    inspection = Inspection(Candidate(ImageSource(name, Path(name)), tuple(captions)), name, (8, 8))
    return WorkItem(
        str(number),
        str(number),
        tuple(captions),
        inspection,
        Geometry((0, 0, 8, 8), (8, 8)),
        tuple(captions.values()),
        (0,) * len(captions),
        1,
    )


class CountingEncoder:
    """A stand-in that tells what it was given; an embedding is the caption's length."""

    text_width = 2

    def __init__(self, lengths: dict[str, int]) -> None:
        self.lengths = lengths
        self.batches: list[list[str]] = []

    def encode(self, captions):
        self.batches.append(list(captions))
        return [
            EncodedCaption(
                torch.full((self.lengths[text], 2), float(len(text))),
                torch.ones(self.lengths[text], dtype=torch.bool),
            )
            for text in captions
        ]


LENGTHS = {"bb": 4, "a": 7, "ccc": 2, "dd": 4}
ITEMS = [item(0, {"bb": 4, "a": 7}), item(1, {"ccc": 2}), item(2, {"dd": 4, "bb": 4})]


def test_unique_captions_by_length_then_id_in_fixed_batches():
    batches = caption_batches(ITEMS, 2)
    assert [[caption.text for caption in batch] for batch in batches] == [
        ["ccc", "bb"],
        ["dd", "a"],
    ]
    assert caption_batches(ITEMS[::-1], 2) == batches


def test_stored_embeddings_are_bf16_and_come_back_from_the_disk(tmp_path):
    batches = caption_batches(ITEMS, 3)
    encoder = CountingEncoder(LENGTHS)
    texts = encode_captions(encoder, batches)
    assert encoder.batches == [["ccc", "bb", "dd"], ["a"]]
    assert texts["a"].prompt_embeds.dtype == torch.bfloat16
    assert texts["a"].prompt_embeds.shape == (7, 2)
    store = TextStore(tmp_path)
    assert store.get(batches) is None
    store.put(batches, texts)
    loaded = store.get(batches)
    assert loaded is not None and loaded.keys() == texts.keys()
    for name, text in texts.items():
        assert torch.equal(loaded[name].prompt_embeds, text.prompt_embeds)
        assert torch.equal(loaded[name].prompt_mask, text.prompt_mask)
    assert store.get(caption_batches(ITEMS, 2)) is None  # other batches may give other bits
    store.path(batches).write_bytes(store.path(batches).read_bytes()[:-5])
    assert store.get(batches) is None
    store.drop(batches)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_does_not_fit_is_noticed():
    encoder = CountingEncoder({**LENGTHS, "a": 9})
    with pytest.raises(QwenLoraError, match="7 tokens were counted, 9 encoded"):
        encode_captions(encoder, caption_batches(ITEMS, 4))
