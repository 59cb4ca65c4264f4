"""From the bytes of a caption file, or the texts of a metadata row, to the captions of an image."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from qwen_lora.config.schema import DataConfig
from qwen_lora.hashing import canonical_json
from qwen_lora.precompute.reasons import Reason

CAPTION_TYPES = ("txt", "caption", "json")  # sidecar extensions, without the dot
SIDECAR_KEYS = ("caption", "prompt", "text")  # of a .json sidecar; the first that is there counts
ROW_KEYS = ("text", "prompt", "caption")  # of a metadata row; the first that is there counts
CAPTION_MAX_BYTES = 1 << 20  # of a caption file that is read at all
# What fits a record: its JSON member holds 256 KiB with names, its tensor header 64 KiB.
STORED_MAX_BYTES = 192 << 10
CAPTIONS_MAX = 256
_LINE_END = re.compile(r"\r\n|\r|\n")


class CaptionError(Exception):
    """Why one image has no usable caption: `reason` and `detail` of its Skip."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


def caption_types(data: DataConfig) -> tuple[str, ...]:
    """The sidecar extensions that the settings allow."""
    return CAPTION_TYPES if data.caption_type == "auto" else (data.caption_type,)


def read_sidecar(kind: str, content: bytes, data: DataConfig) -> tuple[str, ...]:
    """Captions of a sidecar of type `kind` (txt, caption or json). Raises CaptionError."""
    texts = json_texts(content) if kind == "json" else [decode(content)]
    return finish_captions(texts, data)


def json_texts(content: bytes) -> list[str]:
    """The texts of a .json sidecar under caption, prompt or text. Raises CaptionError."""
    try:
        value = json.loads(decode(content))
    except (ValueError, RecursionError) as error:
        raise CaptionError("caption_unreadable", f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CaptionError("caption_unreadable", "the JSON is not an object with a caption")
    texts = texts_of(value, SIDECAR_KEYS)
    if texts is None:
        raise CaptionError("caption_missing", f"the JSON has none of {', '.join(SIDECAR_KEYS)}")
    return texts


def texts_of(row: dict[Any, Any], keys: Sequence[str]) -> list[str] | None:
    """The texts under the first of `keys` that is there; None when there is none.

    A null counts as absent. Raises CaptionError for a value that is neither text nor a list of it.
    """
    for key in keys:
        if row.get(key) is not None:
            return as_texts(row[key], key)
    return None


def as_texts(value: object, what: str) -> list[str]:
    """A text or a list of texts as a list. Raises CaptionError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return list(value)
    raise CaptionError("caption_unreadable", f"{what} is neither a text nor a list of texts")


def decode(content: bytes) -> str:
    """Strict UTF-8, with or without a byte order mark. Raises CaptionError."""
    if len(content) > CAPTION_MAX_BYTES:
        raise CaptionError("caption_too_long", f"more than {CAPTION_MAX_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "; UTF-16?" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise CaptionError(
            "bad_encoding", f"the caption is not UTF-8 at byte {error.start}{hint}"
        ) from None


def finish_captions(texts: Sequence[str], data: DataConfig) -> tuple[str, ...]:
    """Lines, white space, trigger word and empty captions as the settings say.

    join: the lines of a text, each stripped, with one space between; variants: each line that is
    not empty is a caption; first: the first such line. An empty caption becomes the trigger word,
    if there is one. Without it, skip drops empty captions and unconditional keeps them.
    Raises CaptionError, also when no caption is left.
    """
    for text in texts:
        _check(text)
    word = data.trigger_word.strip()
    captions = [caption for text in texts or [""] for caption in _lines(text, data.caption_lines)]
    if word:
        captions = [f"{word}, {caption}" if caption else word for caption in captions]
    elif data.empty_caption == "skip":
        captions = [caption for caption in captions if caption]
    if not captions:
        raise CaptionError(
            "caption_empty", "data_config.empty_caption: unconditional trains it without a prompt"
        )
    if len(captions) > CAPTIONS_MAX:
        raise CaptionError(
            "too_many_captions", f"{len(captions)}; a record holds {CAPTIONS_MAX}, list fewer"
        )
    if (stored := len(canonical_json(captions))) > STORED_MAX_BYTES:
        raise CaptionError(
            "caption_too_long", f"{stored} bytes as stored; a record holds {STORED_MAX_BYTES}"
        )
    return tuple(captions)


def _lines(text: str, mode: str) -> list[str]:
    lines = [line for line in (part.strip() for part in _LINE_END.split(text)) if line]
    if mode == "join":
        return [" ".join(lines)]
    if mode == "first":
        lines = lines[:1]
    return lines or [""]


def _check(text: str) -> None:
    if text.startswith("version https://git-lfs"):
        raise CaptionError("caption_unreadable", "a Git LFS pointer; run `git lfs pull`")
    if "\0" in text:
        raise CaptionError("bad_encoding", "the caption holds a NUL character")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise CaptionError("bad_encoding", "the caption holds half a surrogate pair") from None
    if size > CAPTION_MAX_BYTES:
        raise CaptionError("caption_too_long", f"more than {CAPTION_MAX_BYTES} bytes")
