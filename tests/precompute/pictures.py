"""A small picture, and what a stored one is taken for: its pixels, or the reason of a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_lora.config.schema import DataConfig
from qwen_lora.precompute.images import DecodeError, decode_image
from qwen_lora.precompute.inspect import inspect_image
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, Skip
from qwen_lora.shards.format import Geometry

SIDE = 64
RED, GREEN = (200, 10, 10), (10, 200, 10)


def picture() -> Image.Image:
    """64 x 96 (height x width): red above green, a blue corner at the top left."""
    pixels = np.zeros((SIDE, 96, 3), np.uint8)
    pixels[:32], pixels[32:] = RED, GREEN
    pixels[:16, :16] = (10, 10, 200)
    return Image.fromarray(pixels)


def inspect(path: Path, data: DataConfig | None = None) -> Inspection | Skip:
    return inspect_image(
        Candidate(ImageSource(path.name, path), ("a caption",)), data or DataConfig()
    )


def pixels_of(path: Path, data: DataConfig | None = None) -> np.ndarray:
    """The whole image, not resized."""
    found = inspect(path, data)
    assert isinstance(found, Inspection), found
    height, width = found.original_size
    geometry = Geometry((0, 0, height, width), (height, width))
    return decode_image(found, geometry, data or DataConfig())


def reason(path: Path, data: DataConfig | None = None) -> str:
    """Why inspection or, if that passes, decoding refuses the file."""
    found = inspect(path, data)
    if isinstance(found, Skip):
        return found.reason
    height, width = found.original_size
    geometry = Geometry((0, 0, height, width), (height, width))
    with pytest.raises(DecodeError) as error:
        decode_image(found, geometry, data or DataConfig())
    return error.value.reason


def close(found: np.ndarray, expected: Image.Image, tolerance: int) -> bool:
    difference = found.astype(int) - np.asarray(expected.convert("RGB")).astype(int)
    return bool(np.abs(difference).max() <= tolerance)
