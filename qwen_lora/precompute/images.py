"""From a file's bytes to the pixels of a bucket: orientation, colour, alpha, crop, resize, flip."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen_lora.config.schema import DataConfig
from qwen_lora.hashing import sha256_hex
from qwen_lora.precompute.inspect import open_image, oriented_size, read_source, why_undecodable
from qwen_lora.precompute.types import Inspection
from qwen_lora.shards.format import Geometry

if TYPE_CHECKING:
    from PIL import Image

# Part of the fingerprint: another number when the pixels of any image would change.
RESIZE_ALGORITHM = {"fast": "cv2-area-lanczos4-1", "exact": "pillow-lanczos-1"}
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class DecodeError(Exception):
    """An image that cannot be used: `reason` is a fixed word, `detail` for a person."""

    def __init__(self, reason: str, detail: str) -> None:
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
        image.load()
        image = ImageOps.exif_transpose(image)
        top, left, bottom, right = geometry.crop_box
        image = to_rgb(image.crop((left, top, right, bottom)), image, data.alpha_background)
    except DecodeError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise DecodeError("undecodable", why_undecodable(content, error)) from error
    pixels = resize(image, geometry.bucket, data.resize)
    return np.ascontiguousarray(pixels[:, ::-1]) if geometry.flipped else pixels


def to_rgb(crop: Image.Image, original: Image.Image, background: str) -> Image.Image:
    """8-bit sRGB: ICC profile applied, 16 bits scaled, alpha put on `background`.

    A missing, broken or unsuitable profile means sRGB. `original` is the image that the crop was
    taken from: `crop` keeps its pixels, not all of its colour information.
    """
    from PIL import Image

    profile = original.info.get("icc_profile")
    transparency = original.info.get("transparency")
    if crop.mode in SIXTEEN_BIT_MODES:
        crop = _scale_16_bit(crop)
        transparency = None
    if transparency is not None and crop.mode in ("1", "L", "P", "RGB"):
        crop.info["transparency"] = transparency
        crop = crop.convert("RGBA")
    elif crop.mode == "La":
        crop = crop.convert("LA").convert("RGBA")
    elif crop.mode in ("P", "PA", "LA", "RGBa"):
        crop = crop.convert("RGBA" if crop.has_transparency_data else "RGB")
    if crop.mode != "RGBA":
        return _to_srgb(crop, profile)
    alpha = crop.getchannel("A")
    colours = _to_srgb(crop.convert("RGB"), profile)
    return Image.composite(colours, Image.new("RGB", crop.size, background), alpha)


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits to 8: 65535 becomes 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and image.mode in ("RGB", "L", "CMYK"):
        from PIL import ImageCms

        try:
            transform = _srgb_transform(profile, image.mode)
            converted = ImageCms.applyTransform(image, transform)
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # broken, or a profile for another kind of pixel: taken as sRGB
    return image.convert("RGB")


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


def resize(image: Image.Image, size: tuple[int, int], how: str) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 of exactly `size`.

    fast: OpenCV, area when shrinking, Lanczos over 8 x 8 pixels when enlarging; exact: Pillow's
    Lanczos, which widens its window when shrinking.
    """
    height, width = size
    if how == "exact":
        from PIL import Image

        if image.size == (width, height):
            return np.asarray(image)
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    import cv2

    cv2.setNumThreads(1)  # images are spread over threads already; one thread each fixes the bytes
    pixels = np.asarray(image)
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=method), np.uint8)
