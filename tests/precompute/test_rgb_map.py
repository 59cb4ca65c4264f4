"""The linear map from latents to RGB: the mathematics, and the file that a run leaves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_lora.precompute import rgb_map
from qwen_lora.precompute.images import DecodeError, decode_image
from qwen_lora.precompute.rgb_map import Rows, fit, image_patches, map_scale
from qwen_lora.precompute.run import precompute
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection
from qwen_lora.shards.format import Geometry
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.previews import RgbMap, encode_rgb, neighbourhoods
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import publish_manifest

STEP = rgb_map.STEPS_PER_UNIT


def random_rows(
    count: int, channels: int = 4, scale: int = 2, seed: int = 0, area: int = 1
) -> Rows:
    """Latents in whole steps, of very different spread, and unrelated pixels."""
    rng = np.random.default_rng(seed)
    spread = np.geomspace(0.02, 3, 9 * channels)
    latents = np.rint(rng.normal(0.3, spread, (count, 9 * channels)) * STEP) / STEP
    patches = rng.integers(0, 255 * area + 1, (count, 3 * scale * scale))
    return Rows(latents.astype(np.float32), patches.astype(np.uint32), area)


@pytest.mark.parametrize("count", [1, 5, 400])  # fewer rows than unknowns, too
@pytest.mark.parametrize("area", [1, 4])
def test_the_fit_is_numpys_least_squares(count: int, area: int) -> None:
    rows = random_rows(count, area=area)
    x, y = rows.latents.astype(np.float64), rows.patches / (255 * area)
    centred, aim = x - x.mean(axis=0), y - y.mean(axis=0)
    ridge = rgb_map.RIDGE_ROWS * (centred**2).mean() + rgb_map.RIDGE_FLOOR * count
    inputs = x.shape[1]
    weight = np.linalg.lstsq(
        np.vstack([centred, np.sqrt(ridge) * np.eye(inputs)]),
        np.vstack([aim, np.zeros((inputs, y.shape[1]))]),
    )[0]
    made = fit([rows], 2)
    assert np.allclose(made.weight, weight, rtol=6e-5, atol=1e-9)
    assert np.allclose(made.bias, y.mean(axis=0) - x.mean(axis=0) @ weight, rtol=6e-5, atol=1e-7)


def test_neither_order_nor_division_of_the_rows_changes_a_bit() -> None:
    rows = random_rows(9000)
    whole = fit([rows], 2)
    order = np.random.default_rng(1).permutation(9000)
    parts = [Rows(rows.latents[some], rows.patches[some], 1) for some in np.split(order, 9)]
    assert encode_rgb(fit(parts, 2)) == encode_rgb(whole)


def test_a_linear_picture_is_drawn_again() -> None:
    """Images that a map drew from smooth latents: the fit finds what draws them."""
    rng = np.random.default_rng(2)
    true = RgbMap(
        rng.normal(0, 0.01, (36, 192)).astype(np.float32), np.full(192, 0.5, np.float32), 8, 0.0
    )
    images, pairs = [], []
    for _ in range(4):
        latents = rng.normal(size=(4, 20, 16)).astype(np.float16).astype(np.float32)
        image = true.apply(latents)
        patches, area = image_patches(image, 8, 8)
        images.append(Rows(neighbourhoods(latents), patches, area))
        pairs.append((latents, image))
    made = fit(images, 8)
    errors = [np.abs(made.apply(x).astype(int) - image).mean() / 255 for x, image in pairs]
    assert made.mean_abs_error == pytest.approx(np.mean(errors), rel=1e-3)
    assert made.mean_abs_error < 0.003


def test_latents_that_do_not_vary_give_the_mean_colour() -> None:
    rows = random_rows(50)
    still = Rows(np.zeros_like(rows.latents), rows.patches, 1)
    made = fit([still], 2)
    assert not made.weight.any()
    assert np.allclose(made.bias, rows.patches.mean(axis=0) / 255, rtol=6e-5)


def test_a_coarse_latent_is_drawn_smaller() -> None:
    assert [map_scale(scale) for scale in (1, 4, 8, 12, 16, 32, 17)] == [1, 4, 8, 6, 8, 8, 1]
    pixels = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)
    patches, area = image_patches(pixels, 16, 8)
    assert patches.shape == (2 * 3, 3 * 8 * 8) and area == 4
    smaller = np.asarray(Image.fromarray(pixels).reduce(2)).astype(float)  # means of 2 x 2 pixels
    drawn = (patches / area).reshape(2, 3, 3, 8, 8).transpose(0, 3, 1, 4, 2).reshape(16, 24, 3)
    assert np.abs(drawn - smaller).max() <= 0.5


def differences(settings, rgb: RgbMap) -> list[float]:
    """Mean absolute error of each sample of a set, with the reader's own means."""
    errors = []
    with ShardSet.open(settings.shards_dir) as shards:
        for row in range(len(shards)):
            record = shards.read(row, captions=[])
            meta, (latents, *_) = record.meta, record.tensors.values()
            source = ImageSource(meta.source, settings.data_config.img_dir / meta.source)
            inspection = Inspection(
                Candidate(source, tuple(meta.captions)), meta.source_sha256, meta.original_size
            )
            geometry = Geometry(meta.crop_box, meta.bucket, meta.flipped)
            pixels = decode_image(inspection, geometry, settings.data_config)
            drawn = rgb.apply(latents.float().numpy())
            assert drawn.shape == pixels.shape
            errors.append(np.abs(drawn.astype(int) - pixels).mean() / 255)
    return errors


@pytest.mark.parametrize("posterior", ["mode", "mean_std"])
def test_a_run_leaves_a_map_that_draws_its_images(make_settings, posterior, capsys) -> None:
    # Equal sizes: then the mean over pixels is the mean over images.
    settings = make_settings({"img_size": [64], "square": True}, vae_posterior=posterior)
    precompute(settings)
    assert "map for previews: fitted to 12 images" in capsys.readouterr().err
    with ShardSet.open(settings.shards_dir) as shards:
        rgb = shards.rgb_map()
    assert rgb.scale == 8
    assert rgb.mean_abs_error == pytest.approx(np.mean(differences(settings, rgb)), rel=2e-4)
    plain = RgbMap(np.zeros_like(rgb.weight), np.full_like(rgb.bias, rgb.bias.mean()), 8, 0.0)
    assert rgb.mean_abs_error < 0.8 * np.mean(differences(settings, plain))
    assert verify(settings.shards_dir, deep=True).ok


def test_a_large_set_is_thinned_evenly(make_settings, monkeypatch) -> None:
    """160 positions an image at most; every column and row of the picture has its share."""
    monkeypatch.setattr(rgb_map, "MAX_ROWS", 160 + rgb_map.MAX_IMAGES)
    monkeypatch.setattr(rgb_map, "MAX_IMAGES", 3)
    seen = []
    monkeypatch.setattr(rgb_map, "fit", lambda images, scale: seen.extend(images) or fit(images, 8))
    precompute(make_settings({"square": True}))
    assert len(seen) == 3  # of 144 positions each
    assert 100 < sum(len(image.latents) for image in seen) <= 160 + 64


def test_a_map_is_fitted_once(make_settings, dataset, image_folder) -> None:
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    first = load_manifest(settings.shards_dir)[0]
    for name in ("06.png", "06.txt"):
        shutil.copy(image_folder / name, dataset)
    precompute(settings)
    second = load_manifest(settings.shards_dir)[0]
    assert second.counts["samples"] == first.counts["samples"] + 1
    assert second.rgb == first.rgb and first.rgb is not None


def without_map(folder: Path) -> str:
    """A set as it was before there were maps; the map's content returns by the same run."""
    manifest, name = load_manifest(folder)
    (folder / manifest.rgb.name).unlink()
    publish_manifest(folder, replace(manifest, rgb=None, previous=name))
    return manifest.rgb.name


def test_an_older_set_gets_a_map_at_its_next_run(make_settings, published, no_encoders) -> None:
    settings = make_settings()
    precompute(settings)
    name = without_map(settings.shards_dir)
    no_encoders()
    assert precompute(settings).unchanged == 12
    files = published(settings.shards_dir)
    assert json.loads(files["manifest.json"])["rgb"]["name"] == name and name in files
    precompute(settings)
    assert published(settings.shards_dir) == files


def test_images_that_cannot_be_decoded_any_more_are_left_out(
    make_settings, dataset, monkeypatch, capsys, published
) -> None:
    settings = make_settings({"img_dir": dataset})
    decode, gone = decode_image, {"01.png"}

    def decode_some(inspection, geometry, data):
        name = inspection.candidate.image.name
        if name in gone:
            raise DecodeError("unreadable", "gone")
        if name == "02.png" and len(gone) > 1:
            raise FileNotFoundError(name)
        return decode(inspection, geometry, data)

    monkeypatch.setattr(rgb_map, "decode_image", decode_some)
    assert precompute(settings).written == 4
    assert "fitted to 3 images" in capsys.readouterr().err
    without_map(settings.shards_dir)
    before = published(settings.shards_dir)
    gone |= {"00.png", "03.png"}
    summary = precompute(settings)
    assert (summary.unchanged, summary.exit_code) == (4, 0)
    assert "no latent-to-RGB map for previews was fitted" in capsys.readouterr().err
    assert published(settings.shards_dir) == before  # nothing new, no generation


def test_no_map_is_no_obstacle_to_a_set(make_settings, dataset, monkeypatch) -> None:
    def refuse(*_):
        raise DecodeError("undecodable", "always")

    monkeypatch.setattr(rgb_map, "decode_image", refuse)
    settings = make_settings({"img_dir": dataset})
    assert precompute(settings).written == 4
    with ShardSet.open(settings.shards_dir) as shards:
        assert shards.rgb_map() is None and len(shards) == 4
