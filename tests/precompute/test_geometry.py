"""Few buckets, no upscaling, crops with the bucket's aspect."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError
from qwen_lora.precompute.geometry import bucket_list, bucket_step, make_geometries
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, Skip
from qwen_lora.shards.format import Geometry

MULTIPLE = 16


def image(height: int, width: int, number: int = 0) -> Inspection:
    candidate = Candidate(ImageSource(f"{number}.png", Path("x")), ("a",))
    return Inspection(candidate, f"{number:064x}", (height, width))


def geometry(height: int, width: int, size: int = 1024, **data: object) -> Geometry:
    made = make_geometries(image(height, width), DataConfig(**data), size, MULTIPLE, seed=0)
    assert isinstance(made, tuple) and len(made) == 1
    return made[0]


def random_sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    sizes = []
    for _ in range(count):
        side = 2 ** rng.uniform(6.5, 12.5)
        ratio = 2 ** rng.uniform(-2.5, 2.5)
        sizes.append((max(1, round(side / ratio**0.5)), max(1, round(side * ratio**0.5))))
    return sizes


def test_properties_over_1000_mixed_images() -> None:
    shapes, skipped = set(), 0
    for number, (height, width) in enumerate(random_sizes(1000)):
        made = make_geometries(image(height, width, number), DataConfig(), 1024, MULTIPLE, 0)
        if isinstance(made, Skip):
            assert made.reason == "too_small"
            skipped += 1
            continue
        (one,) = made
        shapes.add(one.bucket)
        top, left, bottom, right = one.crop_box
        rows, columns = bottom - top, right - left
        assert 0 <= top and 0 <= left and bottom <= height and right <= width
        assert rows >= one.bucket[0] and columns >= one.bucket[1], "enlarged"
        assert one.bucket[0] % MULTIPLE == 0 and one.bucket[1] % MULTIPLE == 0
        assert 0.25 <= one.bucket[1] / one.bucket[0] <= 4
        # centred, and the crop's aspect is the bucket's to the pixel
        assert abs(top - (height - bottom)) <= 1 and abs(left - (width - right)) <= 1
        assert abs(columns - rows * one.bucket[1] / one.bucket[0]) <= max(
            1, one.bucket[1] / one.bucket[0]
        )
        assert rows == height or columns == width, "the crop could be larger"
    assert len(shapes) <= 120  # from 64 to 1024 px, aspects 1:4 to 4:1
    assert skipped < 100


def test_photos_of_common_aspects_give_few_shapes() -> None:
    rng = random.Random(1)
    shapes = set()
    for number in range(1000):
        ratio, side = math.exp(rng.gauss(0, 0.35)), math.exp(rng.uniform(6, 8.3))  # 400 to 4000 px
        size = round(side / ratio**0.5), round(side * ratio**0.5)
        made = make_geometries(image(*size, number), DataConfig(), 1024, MULTIPLE, 0)
        assert isinstance(made, tuple)
        shapes.add(made[0].bucket)
    assert 20 < len(shapes) <= 60


def test_buckets_of_1024() -> None:
    buckets = bucket_list(1024**2, 64, 0.25, 4.0)
    assert (1024, 1024) in buckets and (512, 2048) in buckets and (2048, 512) in buckets
    assert len(buckets) == 17
    for height, width in buckets:
        assert height % 64 == 0 and width % 64 == 0
        assert abs(math.log(height * width / 1024**2)) < 0.1
        assert (width, height) in buckets


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (1024, 1024)), ((2000, 3000), (832, 1280)), ((3000, 1000), (1792, 576))],
)
def test_typical_photos(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert geometry(*size).bucket == expected


def test_the_ladder_takes_small_images_without_enlarging() -> None:
    assert geometry(800, 800).bucket == (704, 704)
    assert geometry(600, 600).bucket == (512, 512)
    assert geometry(100, 100).bucket == (96, 96)
    assert geometry(800, 800, upscale=True).bucket == (1024, 1024)
    refused = make_geometries(image(40, 40), DataConfig(), 1024, MULTIPLE, 0)
    assert isinstance(refused, Skip) and refused.reason == "too_small"
    assert geometry(40, 40, upscale=True).bucket == (1024, 1024)


def test_extreme_aspects_are_cropped() -> None:
    one = geometry(600, 6000)
    assert one.bucket == (512, 2048)
    assert one.crop_box[3] - one.crop_box[1] == 2400


def test_steps() -> None:
    assert bucket_step(1024, DataConfig(), 16) == 64
    assert bucket_step(256, DataConfig(), 16) == 16
    assert bucket_step(256, DataConfig(), 32) == 32
    assert bucket_step(1024, DataConfig(bucket_step=32), 16) == 32
    with pytest.raises(InputError, match="multiple of 16"):
        bucket_step(1024, DataConfig(bucket_step=24), 16)


def test_square() -> None:
    assert geometry(1500, 3000, square=True).bucket == (1024, 1024)
    assert geometry(1500, 3000, square=True).crop_box == (0, 750, 1500, 2250)


def test_flip_both_gives_an_image_and_its_mirror() -> None:
    made = make_geometries(image(1024, 1024), DataConfig(flip="both"), 1024, MULTIPLE, 0)
    assert isinstance(made, tuple)
    assert [one.flipped for one in made] == [False, True]
    assert made[0].crop_box == made[1].crop_box


def test_random_ratio_draws_from_the_images_own_hash() -> None:
    data = DataConfig(random_ratio=True)
    drawn = {}
    for number in range(60):
        made = make_geometries(image(2000, 3000, number), data, 1024, MULTIPLE, 0)
        assert made == make_geometries(image(2000, 3000, number), data, 1024, MULTIPLE, 0)
        assert isinstance(made, tuple)
        drawn[number] = made[0].bucket
    assert set(drawn.values()) == {(1024, 1024), (896, 1152), (768, 1344)}
    other = [make_geometries(image(2000, 3000, n), data, 1024, MULTIPLE, 1) for n in range(60)]
    assert [made[0].bucket for made in other if isinstance(made, tuple)] != list(drawn.values())
    portrait = make_geometries(image(3000, 2000, 1), data, 1024, MULTIPLE, 0)
    assert isinstance(portrait, tuple)
    assert portrait[0].bucket[0] >= portrait[0].bucket[1]


def test_only_squares_are_left_of_a_narrow_range() -> None:
    for size in [(2000, 2000), (1000, 3000)]:
        assert geometry(*size, min_aspect=0.99, max_aspect=1.0, size=512).bucket == (512, 512)
