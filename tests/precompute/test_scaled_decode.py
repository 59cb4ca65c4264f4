"""JPEGs decoded at a part of their size: near the whole, never too small, and only if asked for."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_lora.config.schema import DataConfig
from qwen_lora.precompute.geometry import make_geometries
from qwen_lora.precompute.images import _draft, decode_image
from qwen_lora.precompute.inspect import inspect_image
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection
from qwen_lora.shards.format import Geometry

FULL, SCALED = DataConfig(), DataConfig(jpeg_scaled_decode=True)


def smooth(height: int, width: int) -> Image.Image:
    """Colours that change over many pixels, as in a photograph out of focus."""
    few = np.random.default_rng(0).integers(40, 215, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def inspect(path: Path) -> Inspection:
    found = inspect_image(Candidate(ImageSource(path.name, path), ("a caption",)), FULL)
    assert isinstance(found, Inspection)
    return found


def both(path: Path, geometry: Geometry | None = None) -> tuple[np.ndarray, np.ndarray]:
    found = inspect(path)
    if geometry is None:
        geometries = make_geometries(found, FULL, 64, 16, 0)
        assert isinstance(geometries, tuple)
        geometry = geometries[0]
    whole, scaled = (decode_image(found, geometry, data) for data in (FULL, SCALED))
    assert whole.shape == scaled.shape == (*geometry.bucket, 3)
    return whole, scaled


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_it_is_near_the_whole(mode: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(597, 803).convert(mode).save(path, quality=92, exif=exif)
    whole, scaled = both(path)
    difference = np.abs(whole.astype(int) - scaled)
    assert 0 < difference.max() <= 12 and difference.mean() < 2
    for turn in (1, 2, 3):  # another orientation is another picture
        turned = np.rot90(whole, turn)
        if turned.shape == scaled.shape:
            assert np.abs(turned.astype(int) - scaled).mean() > 5


def test_a_crop_and_a_flip(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    smooth(600, 800).save(path, quality=92)
    whole, scaled = both(path, Geometry((101, 203, 501, 603), (48, 48), True))
    difference = np.abs(whole.astype(int) - scaled)
    assert 0 < difference.max() <= 12 and difference.mean() < 1


def test_what_is_not_a_large_jpeg_is_as_before(tmp_path: Path) -> None:
    smooth(600, 800).save(tmp_path / "a.png")
    smooth(230, 300).save(tmp_path / "b.jpg", quality=92)  # under four times the bucket
    for name in ("a.png", "b.jpg"):
        whole, scaled = both(tmp_path / name)
        assert (whole == scaled).all()


def test_never_less_than_twice_the_bucket(tmp_path: Path) -> None:
    path, rng, scales = tmp_path / "a.jpg", random.Random(0), set()
    for _ in range(60):
        size = rng.randint(64, 700), rng.randint(64, 700)
        Image.new("RGB", size[::-1]).save(path)
        found = inspect(path)
        geometries = make_geometries(found, FULL, rng.choice([64, 32]), 16, 0)
        if not isinstance(geometries, tuple):
            continue
        (geometry,) = geometries
        with Image.open(path) as image:
            scale = _draft(image, geometry)
            image.load()
            assert image.size == tuple(-(-side // scale) for side in size[::-1])
        top, left, bottom, right = geometry.crop_box
        spare = min((bottom - top) / geometry.bucket[0], (right - left) / geometry.bucket[1])
        assert scale == max(n for n in (1, 2, 4, 8) if n == 1 or spare / n >= 2)
        scales.add(scale)
        decode_image(found, geometry, SCALED)
    assert scales >= {1, 2, 4}
