"""Every kind of image file that people have: the right pixels, or a reason."""

from __future__ import annotations

import io
import os
import random
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import GREEN, RED, SIDE, close, inspect, picture, pixels_of, reason
from PIL import Image, features

from qwen_lora.config.schema import DataConfig
from qwen_lora.precompute import inspect as inspection_module
from qwen_lora.precompute.images import DecodeError, decode_image, resize
from qwen_lora.precompute.inspect import inspect_image
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, Skip
from qwen_lora.shards.format import Geometry


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_lossless_formats(tmp_path: Path, name: str) -> None:
    picture().save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert close(pixels_of(tmp_path / name), picture(), 0)


def test_jpeg_and_avif(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", quality=98, subsampling=0)
    assert close(pixels_of(tmp_path / "a.jpg"), picture(), 4)
    assert features.check("avif")
    picture().save(tmp_path / "a.avif", quality=98, subsampling="4:4:4")
    assert close(pixels_of(tmp_path / "a.avif"), picture(), 8)


def test_heic_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(picture()).save(path, quality=95)
    assert close(pixels_of(path), picture(), 24)
    monkeypatch.setattr(inspection_module, "heif_available", lambda: False)
    found = inspect(path)
    assert isinstance(found, Skip) and "qwen-lora[heif]" in found.detail


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """However a camera was held, the picture is the same."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(undo[orientation]) if orientation > 1 else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {
        "jpg": {"quality": 98, "subsampling": 0},
        "webp": {"lossless": True},
        "avif": {"quality": 100, "subsampling": "4:4:4"},
    }
    stored.save(path, exif=exif, **options.get(suffix, {}))
    found = inspect(path)
    assert isinstance(found, Inspection) and found.original_size == (SIDE, 96)
    assert close(pixels_of(path), picture(), 4)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_jpegs_are_those_of_opencv(tmp_path: Path, orientation: int) -> None:
    """OpenCV brings its own JPEG decoder and turns by EXIF too."""
    cv2 = pytest.importorskip("cv2")
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((104, 72), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    expected = cv2.imread(str(tmp_path / "a.jpg"), cv2.IMREAD_COLOR)[..., ::-1]
    found = pixels_of(tmp_path / "a.jpg")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 3


def test_heic_is_turned(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = pillow_heif.from_pillow(picture().transpose(Image.Transpose.ROTATE_90))
    file.info["exif"] = exif.tobytes()
    file.save(tmp_path / "a.heic", quality=98, chroma=444)
    assert close(pixels_of(tmp_path / "a.heic"), picture(), 24)


def test_a_phones_jpeg_of_several_pictures(tmp_path: Path) -> None:
    """MPO: a photo with its depth or gain map, not an animation."""
    flat = Image.new("RGB", (SIDE, SIDE), RED)
    flat.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[flat.convert("L")])
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.format == "MPO" and stored.n_frames == 2
    assert close(pixels_of(tmp_path / "a.jpg"), flat, 3)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tif"])
def test_animations_and_pages(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    others = [picture().rotate(90), picture().rotate(180)]
    options = {"lossless": True} if name == "a.webp" else {}
    picture().save(path, save_all=True, append_images=others, **options)
    assert reason(path) == "animated"
    assert close(pixels_of(path, DataConfig(animated="first")), picture(), 0)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_pixels_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE), dtype)).save(tmp_path / "a.tif")
    assert reason(tmp_path / "a.tif") == "unknown_range"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GIF89a" + bytes(100), "none of JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "undecodable"),
    ],
)
def test_what_is_no_image_says_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    found = inspect(tmp_path / "a.jpg")
    assert isinstance(found, Skip) and found.reason == "undecodable"
    assert said in f"{found.reason} {found.detail}"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_no_truncation_is_accepted(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    noise.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    whole = buffer.getvalue()
    # What comes after the last pixel (PNG's end chunk, JPEG's end mark) may be missing.
    pixels_end = len(whole) - (12 if suffix == "png" else 2)
    lengths = random.Random(0).sample(range(pixels_end - 4), 60)
    path = tmp_path / f"a.{suffix}"
    for length in lengths:
        path.write_bytes(whole[:length])
        assert reason(path) == "undecodable", length


def test_size_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (13300, 13300)).save(tmp_path / "bomb.png")

    def decoded(self: Image.Image) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert reason(tmp_path / "bomb.png") == "too_many_pixels"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.usefixtures("within_seconds")
def test_a_pipe_that_takes_an_images_place_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    found = inspect(tmp_path / "a.jpg")
    assert isinstance(found, Skip) and found.reason == "unreadable"
    assert "not a regular file" in found.detail


def test_a_giant_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", 1 << 40)  # a hole
    found = inspect(tmp_path / "a.jpg")
    assert isinstance(found, Skip) and "larger than 1 GiB" in found.detail


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    found = inspect(path)
    assert isinstance(found, Inspection)
    picture().rotate(180).save(path)
    with pytest.raises(DecodeError) as error:
        decode_image(found, Geometry((0, 0, SIDE, SIDE), (SIDE, SIDE)), DataConfig())
    assert error.value.reason == "source_changed"
    path.unlink()
    with pytest.raises(DecodeError, match="unreadable: No such file or directory$"):
        decode_image(found, Geometry((0, 0, SIDE, SIDE), (SIDE, SIDE)), DataConfig())
    gone = inspect(path)
    assert isinstance(gone, Skip) and gone.reason == "unreadable"


def test_an_image_inside_a_tar(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "0001.png")
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmember("0001.png")
    source = ImageSource("a.tar/0001.png", tmp_path / "a.tar", member.offset_data, member.size)
    found = inspect_image(Candidate(source, ("x",)), DataConfig())
    assert isinstance(found, Inspection)
    geometry = Geometry((0, 0, SIDE, 96), (SIDE, 96))
    assert close(decode_image(found, geometry, DataConfig()), picture(), 0)


def test_crop_then_resize_then_flip(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    found = inspect(path)
    assert isinstance(found, Inspection)
    left = decode_image(found, Geometry((0, 0, 16, 16), (16, 16)), DataConfig())
    assert (left == (10, 10, 200)).all()
    plain = decode_image(found, Geometry((0, 0, 64, 96), (32, 48)), DataConfig())
    mirrored = decode_image(found, Geometry((0, 0, 64, 96), (32, 48), True), DataConfig())
    assert (mirrored == plain[:, ::-1]).all() and mirrored.flags.c_contiguous


@pytest.mark.parametrize("how", ["fast", "exact"])
@pytest.mark.parametrize("size", [(32, 48), (128, 192)])
def test_resizing_keeps_flat_colours_and_size(how: str, size: tuple[int, int]) -> None:
    found = resize(picture(), size, how, (0, 0, 96, SIDE))
    assert found.shape == (*size, 3) and found.dtype == np.uint8
    assert found[size[0] // 4, size[1] * 3 // 4].tolist() == list(RED)
    assert found[size[0] * 3 // 4, size[1] // 2].tolist() == list(GREEN)


@pytest.mark.parametrize("how", ["fast", "exact"])
@pytest.mark.parametrize("size", [(24, 32), (40, 50), (70, 90)])
@pytest.mark.parametrize("converted", [False, True])
def test_a_box_is_resized_as_if_it_were_alone(
    how: str, size: tuple[int, int], converted: bool, tmp_path: Path
) -> None:
    """No pixel beside the box counts, in images that need a conversion and in those that do not."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, 96, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.convert("RGBA" if converted else "RGB").save(tmp_path / "a.png")
    found = inspect(tmp_path / "a.png")
    assert isinstance(found, Inspection)
    geometry = Geometry((11, 7, 51, 57), size)
    alone = image.crop((7, 11, 57, 51))
    expected = resize(alone, size, how, (0, 0, 50, 40))
    given = decode_image(found, geometry, DataConfig(resize=how))
    assert (given == expected).all() and given.flags.c_contiguous


def test_exact_is_pillows_lanczos() -> None:
    expected = picture().resize((40, 24), Image.Resampling.LANCZOS)
    assert (resize(picture(), (24, 40), "exact", (0, 0, 96, SIDE)) == np.asarray(expected)).all()


def test_random_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """Flipped bits give pixels or a reason, never an exception."""
    makers: list[Callable[[Path], None]] = [
        lambda path: picture().save(path, "PNG"),
        lambda path: picture().save(path, "JPEG"),
        lambda path: picture().save(path, "TIFF"),
        lambda path: picture().save(path, "WEBP"),
        lambda path: picture().save(path, "BMP"),
    ]
    path = tmp_path / "a.jpg"
    rng = random.Random(0)
    for make in makers:
        make(path)
        whole = path.read_bytes()
        for _ in range(40):
            changed = bytearray(whole)
            for _ in range(3):
                changed[rng.randrange(min(len(changed), 600))] = rng.randrange(256)
            path.write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = inspect(path, DataConfig(max_pixels=1_000_000))
                if isinstance(found, Inspection):
                    size = found.original_size
                    try:
                        decode_image(found, Geometry((0, 0, *size), size), DataConfig())
                    except DecodeError:
                        pass
