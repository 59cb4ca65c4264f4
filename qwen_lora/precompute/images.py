"""From a file's bytes to the pixels of a bucket: orientation, colour, alpha, crop, resize, flip."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen_lora.config.schema import DataConfig
from qwen_lora.hashing import sha256_hex
from qwen_lora.precompute.inspect import open_image, oriented_size, read_source, why_undecodable
from qwen_lora.precompute.reasons import Reason
from qwen_lora.precompute.types import Inspection
from qwen_lora.shards.format import Geometry

if TYPE_CHECKING:
    from PIL import Image

# Part of the fingerprint: another number when the pixels of any image would change.
RESIZE_ALGORITHM = {"fast": "cv2-area-lanczos4-1", "exact": "pillow-lanczos-1"}
SCALED_DECODE = "jpeg-scaled-1"  # behind the resize algorithm's name where it is asked for
SCALES = (8, 4, 2)  # at which libjpeg decodes to 1 / n of the size
SPARE = 2  # what is decoded is at least so many times larger than the bucket, each side
PNG_DEPTH_BYTE = 24  # in the header: bits of a channel
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class DecodeError(Exception):
    """An image that cannot be used: `reason` is a fixed word, `detail` for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode_image(inspection: Inspection, geometry: Geometry, data: DataConfig) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] uint8 sRGB of one geometry.

    Raises DecodeError when the bytes changed since the inspection or cannot be decoded.
    """
    try:
        content = read_source(inspection.candidate.image)
    except (OSError, ValueError) as error:
        detail = str(getattr(error, "strerror", None) or error)  # without the path
        raise DecodeError("unreadable", detail) from error
    if sha256_hex(content) != inspection.source_sha256:
        raise DecodeError("source_changed", "the file changed while this run was reading it")
    try:
        from PIL import ImageOps

        image = open_image(content)
        if oriented_size(image, content) != inspection.original_size:
            raise ValueError("the header's size is not the image's")
        scale = _draft(image, geometry) if data.jpeg_scaled_decode else 1
        image.load()
        if image.format == "PNG":
            _scale_png_transparency(image, content)
        ImageOps.exif_transpose(image, in_place=True)
        height, width = (math.ceil(side / scale) for side in inspection.original_size)
        if (image.height, image.width) != (height, width):
            raise ValueError("the orientation is not the header's")
        top, left, bottom, right = (round(edge / scale) for edge in geometry.crop_box)
        info = image.info
        if image.mode != "RGB" or "icc_profile" in info or "transparency" in info:
            if (top, left, bottom, right) != (0, 0, height, width):
                image = image.crop((left, top, right, bottom))
            image = to_rgb(image, info, data.alpha_background)
            top, left, bottom, right = 0, 0, image.height, image.width
    except DecodeError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise DecodeError("undecodable", why_undecodable(content, error)) from error
    pixels = resize(image, geometry.bucket, data.resize, (left, top, right, bottom))
    return np.ascontiguousarray(pixels[:, ::-1] if geometry.flipped else pixels)


def _draft(image: Image.Image, geometry: Geometry) -> int:
    """Have a JPEG decoded to 1 / n of its size where that leaves enough to shrink; n."""
    if image.format != "JPEG":
        return 1
    top, left, bottom, right = geometry.crop_box
    spare = min((bottom - top) / geometry.bucket[0], (right - left) / geometry.bucket[1])
    whole = image.size
    for scale in SCALES:
        if spare >= SPARE * scale:
            image.draft(None, (whole[0] // scale, whole[1] // scale))
            return round(whole[0] / image.width)
    return 1


def to_rgb(image: Image.Image, info: Mapping[Any, Any], background: str) -> Image.Image:
    """8-bit sRGB: ICC profile applied, 16 bits scaled, alpha put on `background`.

    `info` is Pillow's, of the file that the image was cut from. A missing, broken or unsuitable
    profile means sRGB.
    """
    from PIL import Image

    colours, alpha = _split_alpha(image, info.get("transparency"))
    del image  # copies of a large picture are what memory goes to
    rgb = _to_srgb(colours, info.get("icc_profile"))
    if alpha is None:
        return rgb
    composed = Image.new("RGB", rgb.size, background)
    composed.paste(rgb, mask=alpha)
    return composed


def _split_alpha(image: Image.Image, transparency: Any) -> tuple[Image.Image, Image.Image | None]:
    """Colours of 8 bits without alpha, and alpha (L) if there is any.

    `transparency` is a PNG's transparent colour, or alpha by palette entry; None without one.
    """
    from PIL import Image

    if image.mode in SIXTEEN_BIT_MODES:
        opaque = None if transparency is None else np.asarray(image) != transparency
        alpha = None if opaque is None else Image.fromarray(opaque.astype(np.uint8) * 255)
        return _scale_16_bit(image), alpha
    if transparency is not None and image.mode in ("1", "L", "P", "RGB"):
        image.info["transparency"] = transparency
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    elif image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image, None


def _scale_png_transparency(image: Image.Image, content: bytes) -> None:
    """Pillow tells a PNG's transparent colour in the file's bits; its pixels have 8."""
    transparency = image.info.get("transparency")
    bits = content[PNG_DEPTH_BYTE]
    if image.mode in ("1", "L") and isinstance(transparency, int) and transparency < 1 << bits:
        image.info["transparency"] = transparency * 255 // ((1 << bits) - 1)
    elif image.mode == "RGB" and isinstance(transparency, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparency)


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits to 8: 65535 becomes 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode in ("YCbCr", "HSV"):  # other writings of RGB, which their profile is for
        image = image.convert("RGB")
    if profile and image.mode in ("RGB", "L", "CMYK"):
        from PIL import ImageCms

        for mode in (image.mode, "RGB") if image.mode == "L" else (image.mode,):
            try:
                transform = _srgb_transform(profile, mode)
                given = image if image.mode == mode else image.convert(mode)
                converted = ImageCms.applyTransform(given, transform)
            except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
                continue  # broken, or a profile for another kind of pixel: taken as sRGB
            if converted is not None:
                return converted
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> Any:
    """From a profile to sRGB. Raises PyCMSError when the profile is broken or not for `mode`."""
    from PIL import ImageCms

    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )


def resize(
    image: Image.Image, size: tuple[int, int], how: str, box: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """`box` of an RGB image, (left, top, right, bottom) as in Pillow -> [H, W, 3] uint8 of `size`.

    fast: OpenCV, area when shrinking, Lanczos over 8 x 8 pixels when enlarging; exact: Pillow's
    Lanczos, which widens its window when shrinking.
    """
    height, width = size
    if how == "exact":
        from PIL import Image

        if box != (0, 0, *image.size):
            image = image.crop(box)
        if image.size == (width, height):
            return np.asarray(image)
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    import cv2

    cv2.setNumThreads(1)  # images are spread over threads already; one thread each fixes the bytes
    left, top, right, bottom = box
    pixels = np.asarray(image)[top:bottom, left:right]  # no copy, unlike Pillow's crop
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=method), np.uint8)
