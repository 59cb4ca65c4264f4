"""Datasets that change between runs, what the encoders are given, and which files are opened."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SETTLED = 10**18  # ns: long ago, so that hashes of files with this time are remembered


@dataclass
class Encodes:
    """What the real encoders were given, call by call."""

    images: list[int] = field(default_factory=list)  # per call of the VAE
    captions: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)  # names of images whose pixels were decoded

    @property
    def counts(self) -> tuple[int, int]:
        """Images through the VAE, captions through the text encoder."""
        return sum(self.images), len(self.captions)

    def clear(self) -> None:
        for each in (self.images, self.captions, self.decoded):
            each.clear()


def watch_encoders(monkeypatch: pytest.MonkeyPatch) -> Encodes:
    """The unconditional embedding, which belongs to no image, is left out."""
    from qwen_lora.families.qwen_image.text import QwenPromptEncoder
    from qwen_lora.families.qwen_image.vae import QwenLatentEncoder
    from qwen_lora.precompute import encode
    from qwen_lora.shards.format import UNCONDITIONAL_CAPTION

    seen = Encodes()
    encode_images, encode_texts = QwenLatentEncoder.encode, QwenPromptEncoder.encode
    decode_image = encode.decode_image

    def images(self, pixels):
        seen.images.append(len(pixels))
        return encode_images(self, pixels)

    def texts(self, captions):
        seen.captions += [text for text in captions if text != UNCONDITIONAL_CAPTION]
        return encode_texts(self, captions)

    def decode(inspection, geometry, data):
        seen.decoded.append(inspection.candidate.image.name)
        return decode_image(inspection, geometry, data)

    monkeypatch.setattr(QwenLatentEncoder, "encode", images)
    monkeypatch.setattr(QwenPromptEncoder, "encode", texts)
    monkeypatch.setattr(encode, "decode_image", decode)
    return seen


def add_image(folder: Path, name: str, seed: int, caption: str, side: int = 32) -> Path:
    """A PNG [side, side] of its own colours, its caption beside it; old enough to be remembered."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(colours, np.ones((side // 4, side // 4, 1), np.uint8))).save(path)
    os.utime(path, ns=(SETTLED, SETTLED))
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


_opened: list[list[str]] = []
_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    if _opened and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened[-1].append(os.path.abspath(os.fsdecode(arguments[0])))


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every path that Python opens meanwhile. The audit hook stays and does nothing outside."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    paths: list[str] = []
    _opened.append(paths)
    try:
        yield paths
    finally:
        _opened.remove(paths)
