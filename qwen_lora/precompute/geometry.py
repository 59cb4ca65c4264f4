"""Buckets, crops and flips: how an image of any size becomes one of few shapes.

Sizes are [height, width] in pixels, aspects width / height.
"""

from __future__ import annotations

import math
from functools import lru_cache

from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError
from qwen_lora.hashing import hash_json
from qwen_lora.precompute.types import Inspection, Skip
from qwen_lora.shards.format import Geometry

LARGE_PX = 512  # from here on sides are multiples of LARGE_STEP, below of SMALL_STEP
LARGE_STEP, SMALL_STEP = 64, 16
SMALLEST_RUNG_MULTIPLES = 4  # the ladder ends at squares of this many image multiples
RANDOM_RATIOS = (16 / 9, 4 / 3, 1.0)  # of landscape images; portraits get them on end


def make_geometries(
    inspection: Inspection, data: DataConfig, img_size: int, image_multiple: int, seed: int
) -> tuple[Geometry, ...] | Skip:
    """The geometries of one image at one resolution: one, or two with flip = both.

    Without `upscale` the bucket comes from the first rung of areas img_size^2, 1/2 of it, 1/4, ...
    that the image fills; below the last rung it is a Skip. The crop is the largest centred box with
    the bucket's aspect. Raises InputError when bucket_step does not suit the family.
    """
    height, width = inspection.original_size
    aspect = _crop_aspect(inspection, data, seed)
    for area in _ladder(img_size, image_multiple):
        bucket = _nearest_bucket(area, aspect, data, image_multiple)
        crop = _centre_crop(height, width, bucket)
        fits = crop[2] - crop[0] >= bucket[0] and crop[3] - crop[1] >= bucket[1]
        if fits or data.upscale:
            flips = (False, True) if data.flip == "both" else (False,)
            return tuple(Geometry(crop, bucket, flipped) for flipped in flips)
    return Skip(
        inspection.candidate.image.name,
        "too_small",
        f"{height} x {width} px (height x width) fill no bucket, the smallest tried was "
        f"{bucket[0]} x {bucket[1]}; set data_config.upscale, or use a larger image",
    )


def bucket_list(
    area: int, step: int, min_aspect: float, max_aspect: float
) -> tuple[tuple[int, int], ...]:
    """All buckets of about `area` pixels with sides a multiple of `step`, in a fixed order.

    The square, and for each short side the long one that comes nearest to the area: one bucket a
    step and orientation, not one an image. min_aspect <= 1 <= max_aspect.
    """
    square = max(1, round(math.sqrt(area) / step)) * step
    buckets = {(square, square)}
    for multiple in range(1, math.isqrt(area) // step + 2):
        short = multiple * step
        long = max(step, round(area / short / step) * step)
        for bucket in ((short, long), (long, short)):
            if min_aspect <= bucket[1] / bucket[0] <= max_aspect:
                buckets.add(bucket)
    return tuple(sorted(buckets))


def bucket_step(side: float, data: DataConfig, image_multiple: int) -> int:
    """The step of buckets around side^2 pixels. Raises InputError for one the family cannot use."""
    if data.bucket_step is None:
        return math.lcm(LARGE_STEP if side >= LARGE_PX else SMALL_STEP, image_multiple)
    if data.bucket_step <= 0 or data.bucket_step % image_multiple:
        raise InputError(
            f"data_config.bucket_step is {data.bucket_step}; this model needs a multiple of "
            f"{image_multiple}"
        )
    return data.bucket_step


def _ladder(img_size: int, image_multiple: int) -> list[int]:
    """Areas to try: img_size^2 and its halves, down to the smallest rung."""
    smallest = (SMALLEST_RUNG_MULTIPLES * image_multiple) ** 2
    areas = [img_size**2]
    while areas[-1] // 2 >= smallest:
        areas.append(areas[-1] // 2)
    return areas


def _nearest_bucket(
    area: int, aspect: float, data: DataConfig, image_multiple: int
) -> tuple[int, int]:
    step = bucket_step(math.sqrt(area), data, image_multiple)
    if data.square:
        side = max(step, round(math.sqrt(area) / step) * step)
        return side, side
    return _nearest(area, step, data.min_aspect, data.max_aspect, aspect)


@lru_cache(maxsize=65536)
def _nearest(
    area: int, step: int, min_aspect: float, max_aspect: float, aspect: float
) -> tuple[int, int]:
    buckets = bucket_list(area, step, min_aspect, max_aspect)
    return min(
        buckets,
        key=lambda size: (abs(math.log(size[1] / size[0] / aspect)), -size[0] * size[1], size),
    )


def _crop_aspect(inspection: Inspection, data: DataConfig, seed: int) -> float:
    height, width = inspection.original_size
    if not data.random_ratio:
        return width / height
    drawn = int(hash_json([inspection.source_sha256, seed, "random_ratio"])[:8], 16)
    ratio = RANDOM_RATIOS[drawn % len(RANDOM_RATIOS)]
    return ratio if width >= height else 1 / ratio


def _centre_crop(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """[top, left, bottom, right] of the largest centred box with the bucket's aspect."""
    if width * bucket[0] > height * bucket[1]:
        rows, columns = height, min(width, round(height * bucket[1] / bucket[0]))
    else:
        rows, columns = min(height, round(width * bucket[0] / bucket[1])), width
    rows, columns = max(1, rows), max(1, columns)
    top, left = (height - rows) // 2, (width - columns) // 2
    return top, left, top + rows, left + columns
