"""Colour modes, bit depths, transparency and profiles: the colours that a person sees."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from pictures import GREEN, RED, SIDE, close, picture, pixels_of
from PIL import Image, ImageCms

from qwen_lora.config.schema import DataConfig
from qwen_lora.precompute.images import to_rgb


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("L", "png", 0),
        ("1", "png", 0),
        ("P", "png", 0),
        ("CMYK", "tif", 3),
        ("LAB", "tif", 16),
        ("YCbCr", "tif", 4),
    ],
)
def test_colour_modes(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"a.{suffix}"
    stored = picture().convert(mode)
    stored.save(path)
    expected = picture() if mode in ("CMYK", "LAB", "YCbCr") else stored.convert("RGB")
    assert close(pixels_of(path), expected, tolerance)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    found = pixels_of(tmp_path / f"a.{suffix}")
    assert np.abs(found[..., 0].astype(float) - ramp / 257).max() <= 1
    assert found.min() == 0 and found.max() == 255


def test_big_endian_16_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(">u2")
    image = Image.frombytes("I;16B", (SIDE, SIDE), ramp.tobytes())
    image.save(tmp_path / "a.tif")
    found = pixels_of(tmp_path / "a.tif")
    assert np.abs(found[..., 0].astype(float) - ramp.astype(float) / 257).max() <= 1


def test_16_bits_of_colour(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    ramp = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16)
    pixels = np.stack([ramp, ramp[::-1], ramp], -1).reshape(SIDE, SIDE, 3)  # blue, green, red
    assert cv2.imwrite(str(tmp_path / "a.png"), pixels)
    found = pixels_of(tmp_path / "a.png").astype(float)
    assert np.abs(found - pixels[..., ::-1] / 257).max() <= 1


def png(bits: int, colour_type: int, rows: list[bytes], width: int, transparent: bytes) -> bytes:
    """A PNG with a tRNS chunk, of bit depths that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("bits", "colour_type", "hidden", "shown", "transparent", "expected"),
    [
        (1, 0, b"\x00", b"\xff", "0001", None),  # white on white: nothing to see
        (1, 0, b"\x00", b"\xff", "0000", (255, 255, 255)),
        (2, 0, b"\x55" * 2, b"\xaa" * 2, "0001", (170, 170, 170)),
        (4, 0, b"\x33" * 4, b"\x55" * 4, "0003", (85, 85, 85)),
        (8, 0, b"\x33" * 8, b"\x55" * 8, "0033", (85, 85, 85)),
        (16, 0, b"\x33\x10" * 8, b"\x55\x55" * 8, "3310", (85, 85, 85)),
        (8, 2, b"\x33\x40\x50" * 8, b"\x55\xff\x00" * 8, "003300400050", (85, 255, 0)),
        (16, 2, b"\x33\x10\x40\0\x50\0" * 8, b"\x55\x55\xff\xff\0\0" * 8, "331040005000",
         (85, 255, 0)),
    ],
)  # fmt: skip
def test_the_transparent_colour_of_a_png(
    tmp_path: Path,
    bits: int,
    colour_type: int,
    hidden: bytes,
    shown: bytes,
    transparent: str,
    expected: tuple[int, int, int] | None,
) -> None:
    content = png(bits, colour_type, [hidden] * 4 + [shown] * 4, 8, bytes.fromhex(transparent))
    (tmp_path / "a.png").write_bytes(content)
    found = pixels_of(tmp_path / "a.png")
    if expected is None:
        assert (found[:4] == 0).all() and (found[4:] == 255).all()
    else:
        assert (found[:4] == 255).all(), "the hidden colour shows"
        assert (found[4:] == expected).all()


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("La", (0, 0))]
)
def test_transparency_is_put_on_white(tmp_path: Path, mode: str, colour: tuple[int, ...]) -> None:
    if mode == "La":
        image = Image.new("LA", (SIDE, SIDE), colour).convert("La")
        assert (np.asarray(to_rgb(image, image.info, "#ffffff")) == 255).all()
        return
    path = tmp_path / "a.png"
    Image.new(mode, (SIDE, SIDE), colour).save(path)
    assert (pixels_of(path) == 255).all()
    blue = DataConfig(alpha_background="#0000ff")
    assert (pixels_of(path, blue) == (0, 0, 255)).all()


def test_half_transparent_mixes_with_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (SIDE, SIDE), (200, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(pixels_of(tmp_path / "a.png").astype(int) - (227, 127, 127)).max() <= 1


def test_transparent_colours_and_palettes(tmp_path: Path) -> None:
    picture().save(tmp_path / "rgb.png", transparency=RED)
    assert pixels_of(tmp_path / "rgb.png")[20, 60].tolist() == [255, 255, 255]
    palette = Image.new("P", (SIDE, SIDE), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert (pixels_of(tmp_path / "p.png") == 255).all()


def test_icc_profiles_are_applied(tmp_path: Path) -> None:
    """A profile that is far from sRGB changes the pixels as ImageCms itself does."""
    lab = ImageCms.createProfile("LAB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "srgb.png", icc_profile=profile)
    assert close(pixels_of(tmp_path / "srgb.png"), picture(), 1)
    # A profile for other pixels than the image's, and one that is rubbish, mean sRGB.
    wrong = ImageCms.ImageCmsProfile(lab).tobytes()
    picture().save(tmp_path / "lab.png", icc_profile=wrong)
    picture().save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert close(pixels_of(tmp_path / "lab.png"), picture(), 0)
    assert close(pixels_of(tmp_path / "broken.png"), picture(), 0)


def linear_grey() -> bytes:
    """The least ICC profile for grey: its values are light, not sRGB's curve of it."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)  # D50, 16.16
    curve = b"curv" + bytes(8)  # no points: the identity
    tags = struct.pack(">I", 2)
    tags += b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 12)
    header = struct.pack(">I4sI4s4s4s", 188, bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + white[8:]
    return header.ljust(128, b"\0") + tags + white + curve


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles_are_applied(tmp_path: Path, mode: str) -> None:
    """Half the light is 188 in sRGB, with alpha and in 16 bits too."""
    half = Image.new("L", (SIDE, SIDE), 128)
    image = Image.fromarray(np.full((SIDE, SIDE), 128 * 257, np.uint16))
    if mode != "I;16":
        image = half.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=linear_grey())
    assert np.abs(pixels_of(tmp_path / "a.png").astype(int) - 188).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "YCbCr"])
def test_a_swapped_primaries_profile_swaps_colours(tmp_path: Path, mode: str) -> None:
    """sRGB's profile with its red and green primaries exchanged turns red into green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(profile[131])}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    name = "a.tif" if mode == "YCbCr" else "a.png"
    picture().convert(mode).save(tmp_path / name, icc_profile=bytes(profile))
    found = pixels_of(tmp_path / name)
    assert np.abs(found[20, 60].astype(int) - GREEN).max() <= 4
    assert np.abs(found[50, 60].astype(int) - RED).max() <= 4
