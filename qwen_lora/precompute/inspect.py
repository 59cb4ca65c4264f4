"""Bytes and header of one image: its hash, its oriented size, or why it cannot be used.

No pixel is decoded here, so a picture of any claimed size costs nothing.
"""

from __future__ import annotations

import io
import os
from functools import cache
from typing import TYPE_CHECKING

from qwen_lora.config.schema import DataConfig
from qwen_lora.hashing import sha256_hex
from qwen_lora.precompute.files import open_regular
from qwen_lora.precompute.reasons import Reason
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, Skip

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")  # the only decoders ever tried
FILE_MAX_BYTES = 1 << 30
ORIENTATION_TAG = 0x0112
PNG_EXIF_MARKS = (b"eXIf", b"Raw profile type exif", b"tiff:Orientation")
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def inspect_image(candidate: Candidate, data: DataConfig) -> Inspection | Skip:
    """sha256 of the image's bytes and its [height, width] after EXIF orientation."""
    name = candidate.image.name
    try:
        content = read_source(candidate.image)
    except (OSError, ValueError) as error:
        return Skip(name, "unreadable", str(getattr(error, "strerror", None) or error))
    try:
        image = open_image(content)
        problem = _refuse(image, data)
        if problem is not None:
            return Skip(name, *problem)
        height, width = oriented_size(image, content)
    except Exception as error:  # decoders raise anything on hostile bytes
        return Skip(name, "undecodable", why_undecodable(content, error))
    return Inspection(candidate, sha256_hex(content), (height, width))


def read_source(source: ImageSource) -> bytes:
    """The image's bytes. Raises OSError, or ValueError for a file that is too large or cut off."""
    with open_regular(source.path) as file:
        whole = source.size is None or source.offset is None
        size = os.fstat(file.fileno()).st_size if source.size is None else source.size
        if size > FILE_MAX_BYTES:
            raise ValueError(f"larger than {FILE_MAX_BYTES >> 30} GiB")
        file.seek(source.offset or 0)
        content = file.read(FILE_MAX_BYTES if whole else size)
    if not whole and len(content) < size:
        raise ValueError("the tar ends inside this member")
    return content


def open_image(content: bytes) -> Image.Image:
    """Read the header with one of the known decoders. Raises whatever the decoder raises."""
    from PIL import Image

    formats = FORMATS + ("HEIF",) if heif_available() else FORMATS
    # The size is checked against max_pixels before a pixel is decoded; Pillow's own limit would
    # warn about images that the settings allow.
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(io.BytesIO(content), formats=formats)


@cache
def heif_available() -> bool:
    """Whether the heif extra is installed; registers its decoder."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def oriented_size(image: Image.Image, content: bytes) -> tuple[int, int]:
    """[height, width] once the EXIF orientation is applied."""
    height, width = image.height, image.width
    if image.format == "TIFF":  # Pillow turns these itself and tells the turned size
        return height, width
    return (width, height) if orientation(image, content) in TURNED else (height, width)


def orientation(image: Image.Image, content: bytes) -> int:
    """EXIF orientation, 1 where there is none or it makes no sense."""
    # A PNG may carry EXIF behind its pixels, so Pillow decodes it all to find out: only if needed.
    if image.format == "PNG" and not any(mark in content for mark in PNG_EXIF_MARKS):
        return 1
    value = image.getexif().get(ORIENTATION_TAG, 1)
    return value if value in range(1, 9) else 1


def _refuse(image: Image.Image, data: DataConfig) -> tuple[Reason, str] | None:
    pixels = image.width * image.height
    if pixels > data.max_pixels:
        return (
            "too_many_pixels",
            f"{image.height} x {image.width} = {pixels} pixels, data_config.max_pixels is "
            f"{data.max_pixels}",
        )
    if pixels == 0:
        return "undecodable", "an image without pixels"
    # A phone's multi-picture JPEG (MPO) holds a photo and its depth or gain maps, not frames.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1 and data.animated == "refuse":
        return "animated", f"{frames} frames or pages; set data_config.animated: first to take one"
    if image.mode in ("F", "I"):
        return "unknown_range", "32-bit pixels have no known range; convert to 8 or 16 bits"
    return None


def why_undecodable(content: bytes, error: Exception) -> str:
    """For a person: what these bytes are instead of an image."""
    head = content[:512].lstrip()
    if not content:
        return "the file is empty"
    if head[:1] == b"<":
        return "the file holds HTML or XML, not an image (a failed download?)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; run `git lfs pull`"
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
            return "HEIF needs the extra: pip install 'qwen-lora[heif]'"
        return f"none of {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"
