"""The tiny model's tokenizer: Qwen2's algorithm over a vocabulary trained on a short word list.

Byte-level BPE with Qwen2's own pre-tokeniser and NFC normaliser (both live in `Qwen2Tokenizer`).
The merges are trained until each word of the list is one token, so the words of Qwen-Image's chat
template are one token each, as in the real vocabulary, and its prefix has the real length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# Every word of Qwen-Image's prompt template. Without a leading space: those that open a line.
_TEMPLATE_OPENERS = "system Describe user assistant"
_TEMPLATE_WORDS = (
    "the image by detailing color shape size texture quantity text spatial relationships of "
    "objects and background"
)
# Common caption words, so that captions are a handful of tokens, not a string of letters.
_CAPTION_WORDS = """
a an in on at with to from for is are it its this that two three four one no not very some all
photo picture drawing painting sketch icon emoji symbol sign logo render illustration style
red orange yellow green blue purple pink brown black white grey gray gold golden silver dark light
bright pale colorful round square flat long short small large big little tall wide thin thick old
new young open closed empty full wooden metal glass plastic paper stone soft hard smooth shiny
man woman person people child boy girl baby face head hand eye eyes mouth nose ear hair hat smile
smiling crying angry happy sad sleeping laughing wearing holding sitting standing running flying
dog cat bird owl fish horse cow pig sheep rabbit bear lion tiger monkey mouse frog snake turtle
dragon butterfly bee spider crab shark whale dolphin penguin duck chicken badger otter crocodile
tree flower rose leaf leaves grass forest mountain hill river lake sea ocean beach sand sky cloud
clouds sun moon star stars rain snow storm night day morning evening sunset summer winter fire
house building castle tower bridge road street city village garden park window door wall roof
table chair bed lamp clock book pen pencil bag box cup bottle plate knife fork key phone camera
computer screen radio bell ball kite balloon gift party popper flag heart circle triangle line
arrow car bus train truck bicycle boat ship plane rocket wheel ticket chess pawn card game guitar
piano drum music apple banana cherry grape lemon bread cake cheese egg pizza ice cream coffee tea
front back left right top bottom side center under over behind near between around up down
"""
_WORDS_OPENING = "a the photo picture drawing red blue green dog cat owl bicycle party man woman"
_SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_OTHER_ADDED_TOKENS = ["<tool_call>", "</tool_call>"]  # added, but not special, as in Qwen2.5


def byte_symbols() -> list[str]:
    """The printable stand-in of each of the 256 bytes in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    spare = iter(range(0x100, 0x200))
    return [table[byte] if byte in table else chr(next(spare)) for byte in range(256)]


def _training_words(caption_words: Sequence[str], openers: Sequence[str]) -> list[str]:
    """Pre-tokenised words in byte symbols; unique, in a fixed order."""
    symbols = byte_symbols()
    text = [*_TEMPLATE_OPENERS.split(), *openers, "\n\n"]
    text += [f" {word}" for word in [*_TEMPLATE_WORDS.split(), *caption_words]]
    unique = dict.fromkeys(text)
    return ["".join(symbols[byte] for byte in word.encode()) for word in unique]


def train_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, ties by spelling, until every word is whole."""
    sequences = [list(word) for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for sequence in sequences:
            pairs.update(zip(sequence, sequence[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        sequences = [_merge(sequence, best) for sequence in sequences]


def _merge(sequence: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in sequence:
        # Greedy from the left, as BPE applies a merge; a symbol just made never merges again.
        if merged and merged[-1] == pair[0] and symbol == pair[1]:
            merged[-1] = pair[0] + pair[1]
        else:
            merged.append(symbol)
    return merged


def make_tokenizer(
    caption_words: Sequence[str] = tuple(_CAPTION_WORDS.split()),
    openers: Sequence[str] = tuple(_WORDS_OPENING.split()),
) -> Any:
    """A `Qwen2Tokenizer` with a token for each of `caption_words` after a space and each of
    `openers` at the start. By default: common words, 1,000 tokens in all."""
    from transformers import AddedToken, Qwen2Tokenizer

    merges = train_merges(_training_words(caption_words, openers))
    entries = dict.fromkeys([*sorted(byte_symbols()), *(left + right for left, right in merges)])
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(entries)},
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=_SPECIAL_TOKENS,
        model_max_length=131072,
        padding_side="right",
    )
    others = [AddedToken(t, special=False, normalized=False) for t in _OTHER_ADDED_TOKENS]
    tokenizer.add_tokens(others)
    return tokenizer
