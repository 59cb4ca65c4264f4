"""How three-dimensional emoji look, as one number, and whether a picture kept its content.

Flat emoji are areas of one colour with hard edges; rendered ones are shaded: brightness changes
gently nearly everywhere. `shading` is the share of an object's pixels whose brightness differs from
its neighbours by a little. Pictures are [H, W, 3] uint8 of one size, on white.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
GENTLE = (0.01, 0.04)  # of full brightness, to the pixel below and to the right together
WHITE = 0.97  # the object is where a channel is darker than this
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def shading(picture: Picture) -> float:
    """The share of object pixels whose brightness changes gently, in [0, 1]."""
    rgb = picture.astype(np.float64) / 255
    brightness = rgb @ np.array(_LUMA)  # [H, W]
    change = np.abs(np.diff(brightness, axis=0))[:, :-1] + np.abs(np.diff(brightness, axis=1))[:-1]
    inside = rgb.min(axis=2)[:-1, :-1] < WHITE
    gentle = (change >= GENTLE[0]) & (change < GENTLE[1]) & inside
    return float(gentle.sum() / max(1, inside.sum()))


def mean_shading(pictures: Sequence[Picture]) -> float:
    return float(np.mean([shading(picture) for picture in pictures]))


def distance(pictures: Sequence[Picture], others: Sequence[Picture]) -> float:
    """Mean absolute difference of pictures to their counterparts, of RGB in [0, 1]."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([np.abs(a.astype(np.float64) - b).mean() / 255 for a, b in pairs]))


def same_content(pictures: Sequence[Picture], others: Sequence[Picture]) -> float:
    """The share of pictures that are nearer to their own counterpart than to any other's, by mean
    squared difference of pixels: 1 where every prompt still draws its own thing."""
    a = np.stack(pictures).reshape(len(pictures), -1).astype(np.float64)
    b = np.stack(others).reshape(len(others), -1).astype(np.float64)
    squared = ((a[:, None] - b[None]) ** 2).sum(axis=2)  # [n, n]
    return float((squared.argmin(axis=1) == np.arange(len(a))).mean())
