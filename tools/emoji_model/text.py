"""The text side: a tokenizer that knows the captions' words, and a random, frozen text encoder.

Random weights are enough: a token keeps its own direction through two weak layers, so the
transformer can tell every word apart, and its neighbours colour it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from qwen_lora.tiny_model.build import make_text_encoder
from qwen_lora.tiny_model.tokenizer import make_tokenizer

TRIGGER = "emoji"  # data_config.trigger_word: every prompt is "emoji, <name>"
TEXT_WIDTH = 128
_WORD = re.compile(r"[^\W\d_]+")


def build_tokenizer(captions: Iterable[str]) -> Any:
    words = sorted({word for caption in captions for word in _WORD.findall(caption)})
    return make_tokenizer(words, openers=[TRIGGER])


def build_text_encoder(tokenizer: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_text_encoder(tokenizer, width=TEXT_WIDTH, spread=0.05, tied=True)
        embeddings = encoder.get_input_embeddings()
        with torch.no_grad():  # strong against what the layers add
            embeddings.weight.normal_(0.0, 1.0)
    return encoder
