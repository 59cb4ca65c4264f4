"""Fits the linear map from latents to RGB to the images of a shard set.

Its bytes are a function of the samples alone, whatever the CPU, its threads and the linear algebra
library: what is summed are whole numbers, exactly, and the solution takes elementwise steps only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_lora.config.schema import Settings
from qwen_lora.precompute.ahead import work_ahead
from qwen_lora.precompute.images import DecodeError, decode_image
from qwen_lora.precompute.worklist import WantedSample
from qwen_lora.progress import Progress
from qwen_lora.shards.previews import RGB_MAX_SCALE, RgbMap, neighbourhoods, round_digits
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import LATENT_NAMES

MAX_IMAGES = 64
MAX_ROWS = 65_536  # latent positions, over all images
RIDGE_ROWS = 10  # the ridge weighs as much as this many positions
RIDGE_FLOOR = 1e-6  # squared latent units, for latents that hardly vary
STEPS_PER_UNIT = 1024  # latents are fitted in whole steps, close to float16's own
LATENT_MAX = 64  # normalised latents are far smaller; with it sums stay below 2^53
ROWS_AT_ONCE = 4096
ERROR_DIGITS = 4  # the map is applied in float32, where sums may come out a little different


@dataclass(frozen=True)
class Rows:
    """N latent positions of one image and the pixels that they became."""

    latents: NDArray[np.float32]  # [N, 9 * C], neighbourhoods
    patches: NDArray[np.uint32]  # [N, 3 * scale * scale], sums over `area` pixels of 0 to 255
    area: int


def fit_rgb_map(
    shards: ShardSet, wanted: Mapping[str, WantedSample], settings: Settings
) -> RgbMap | None:
    """The map for a set, from those of its samples whose images this run has seen.

    The first MAX_IMAGES by sample id; an image that cannot be decoded (any more) is left out. None,
    and a line that says so, when none is left. Raises ShardError for a damaged record.
    """
    scale = map_scale(shards.manifest.latent_scale)
    images = list(_rows(shards, wanted, settings, scale))
    if not images:
        print(
            "hint: no image of the set can be decoded now, so no latent-to-RGB map for previews "
            "was fitted; a later run does it",
            file=sys.stderr,
        )
        return None
    rgb = fit(images, scale)
    print(
        f"latent-to-RGB map for previews: fitted to {len(images)} images, mean error "
        f"{rgb.mean_abs_error:.3f} of 1",
        file=sys.stderr,
    )
    return rgb


def map_scale(latent_scale: int) -> int:
    """Pixels a side that a latent position is drawn with: its own, or a divisor of at most 8."""
    return max(side for side in range(1, RGB_MAX_SCALE + 1) if latent_scale % side == 0)


def chosen_samples(wanted: Mapping[str, WantedSample], live: Collection[str]) -> list[str]:
    """The samples that the map is fitted to, if their images can be decoded."""
    return sorted(sample_id for sample_id in wanted if sample_id in live)[:MAX_IMAGES]


def _rows(
    shards: ShardSet, wanted: Mapping[str, WantedSample], settings: Settings, scale: int
) -> Iterator[Rows]:
    row_of = {sample_id: row for row, sample_id in enumerate(shards.table.sample_id)}
    chosen = chosen_samples(wanted, row_of)
    full = shards.manifest.latent_scale
    sizes = [wanted[sample_id].geometry.bucket for sample_id in chosen]
    positions = sum((height // full) * (width // full) for height, width in sizes)
    # Odd, so that the positions of an image of even width come from all columns.
    stride = -(-positions // (MAX_ROWS - MAX_IMAGES)) | 1
    name = LATENT_NAMES[shards.manifest.posterior][0]

    def decode(sample_id: str) -> NDArray[np.uint8] | None:
        sample = wanted[sample_id]
        try:
            return decode_image(sample.inspection, sample.geometry, settings.data_config)
        except (DecodeError, OSError):
            return None

    workers = settings.decode_workers
    with (
        closing(work_ahead(chosen, decode, workers=workers, ahead=workers)) as decoded,
        Progress("fitting the preview map", len(chosen), "images") as progress,
    ):
        for sample_id, pixels in decoded:
            if pixels is not None:
                tensors = shards.read(row_of[sample_id], captions=[]).tensors
                latents = tensors[name].float().numpy()  # [C, h, w]
                patches, area = image_patches(pixels, full, scale)
                yield Rows(neighbourhoods(latents)[::stride].copy(), patches[::stride].copy(), area)
            progress.update()


def image_patches(
    pixels: NDArray[np.uint8], latent_scale: int, scale: int
) -> tuple[NDArray[np.uint32], int]:
    """[H, W, 3] -> [h * w, 3 * scale * scale] by colour, row and column, and the number of pixels
    that each value is the sum of."""
    height, width = (side // latent_scale for side in pixels.shape[:2])
    side = latent_scale // scale
    blocks = pixels.reshape(height, scale, side, width, scale, side, 3)
    summed = blocks.sum(axis=(2, 5), dtype=np.uint32)  # [h, scale, w, scale, 3]
    return summed.transpose(0, 2, 4, 1, 3).reshape(height * width, -1), side * side


def fit(images: list[Rows], scale: int) -> RgbMap:
    """Least squares with a ridge: minimises |Y - X W - b|^2 + ridge |W|^2 in float64.

    X: latents in steps of 1 / STEPS_PER_UNIT, Y: RGB in [0, 1]. ridge = RIDGE_ROWS x the mean
    variance of X's columns + RIDGE_FLOOR x rows; b is free of it. Numbers are then rounded.
    """
    area = images[0].area
    sums = _sums(images)
    count = sums.rows
    x_mean = sums.x / count / STEPS_PER_UNIT  # [K]
    y_mean = sums.y / count / (255 * area)  # [P]
    x_x = (sums.x_x - np.outer(sums.x, sums.x) / count) / STEPS_PER_UNIT**2  # [K, K]
    x_y = (sums.x_y - np.outer(sums.x, sums.y) / count) / (STEPS_PER_UNIT * 255 * area)  # [K, P]
    variance = math.fsum(np.diag(x_x).tolist()) / len(x_x) / count
    ridge = RIDGE_ROWS * variance + RIDGE_FLOOR * count
    weight = _solve(x_x + ridge * np.eye(len(x_x)), x_y)
    bias = y_mean - (x_mean[:, None] * weight).sum(axis=0)
    rounded = RgbMap(
        round_digits(weight).astype(np.float32), round_digits(bias).astype(np.float32), scale, 0.0
    )
    return RgbMap(rounded.weight, rounded.bias, scale, _mean_abs_error(rounded, images))


@dataclass
class _Sums:
    """Sums over all rows; x in steps, y in sums of pixels: whole numbers below 2^53."""

    rows: int
    x: NDArray[np.float64]  # [K]
    y: NDArray[np.float64]  # [P]
    x_x: NDArray[np.float64]  # [K, K]
    x_y: NDArray[np.float64]  # [K, P]


def _sums(images: list[Rows]) -> _Sums:
    inputs, outputs = images[0].latents.shape[1], images[0].patches.shape[1]
    sums = _Sums(
        0,
        np.zeros(inputs),
        np.zeros(outputs),
        np.zeros((inputs, inputs)),
        np.zeros((inputs, outputs)),
    )
    for latents, patches in _pieces(images):
        steps = latents.astype(np.float64).clip(-LATENT_MAX, LATENT_MAX) * STEPS_PER_UNIT
        x, y = np.rint(steps), patches.astype(np.float64)
        sums.rows += len(x)
        sums.x += x.sum(axis=0)
        sums.y += y.sum(axis=0)
        sums.x_x += x.T @ x
        sums.x_y += x.T @ y
    return sums


def _pieces(images: list[Rows]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint32]]]:
    """A bounded number of rows at a time, since their float64 copies are large."""
    for image in images:
        for start in range(0, len(image.latents), ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            yield image.latents[piece], image.patches[piece]


def _solve(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """matrix^-1 right by Gauss-Jordan elimination; `matrix` [K, K] is positive definite, so that no
    pivot has to be looked for. No sum is taken here whose order a library could choose."""
    size = len(matrix)
    work = np.hstack([matrix, right])  # [K, K + P]
    for column in range(size):
        pivot = work[column] / work[column, column]
        work -= np.outer(work[:, column], pivot)
        work[column] = pivot
    return work[:, size:]


def _mean_abs_error(rgb: RgbMap, images: list[Rows]) -> float:
    """Of RGB in [0, 1], between what the map draws and the image, rounded."""
    area, total, values = images[0].area, 0, 0
    for latents, patches in _pieces(images):
        drawn = rgb.apply_rows(latents).astype(np.int64) * area
        total += int(np.abs(drawn - patches).sum())
        values += patches.size
    return float(round_digits(total / (255 * area * values), ERROR_DIGITS))
