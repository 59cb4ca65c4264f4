"""A rerun encodes what changed and nothing else."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from changing_sets import add_image, opened_files, watch_encoders

from qwen_lora.config.schema import Settings
from qwen_lora.errors import Stopped
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of 32 x 32 pixels, each with its own caption."""
    for index in range(6):
        add_image(tmp_path / "images", f"{index}", index, f"picture {index}")
    return tmp_path / "images"


@pytest.fixture
def settings(make_settings: Callable[..., Settings], folder: Path) -> Settings:
    return make_settings({"img_dir": folder, "img_size": [32]})


def records(folder: Path) -> dict:
    """source name -> record, of live samples; the whole set is verified first"""
    assert verify(folder).problems == []
    with ShardSet.open(folder) as shards:
        found = [shards.read(row) for row in range(len(shards))]
    return {record.meta.source: record for record in found}


@pytest.mark.parametrize("images", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_new_image_costs_one_image(make_settings, tmp_path, monkeypatch, images):
    folder = tmp_path / "many"
    for index in range(images):
        add_image(folder, f"{index:04d}", index, f"picture {index}")
    settings = make_settings(
        {"img_dir": folder, "img_size": [32]},
        shard_max_samples=None,
        vae_batch_size=32,
        text_batch_size=32,
    )
    seen = watch_encoders(monkeypatch)
    precompute(settings)
    assert seen.counts == (images, images)
    seen.clear()
    new = add_image(folder, "new", images, "a new picture")
    with opened_files() as opened:
        summary = precompute(settings)
    assert (summary.seen, summary.written, summary.unchanged) == (images + 1, 1, images)
    assert seen.counts == (1, 1)
    assert seen.captions == ["a new picture"]
    assert {path for path in opened if path.endswith(".png")} == {str(new)}
    with opened_files() as opened:
        assert precompute(settings).unchanged == images + 1
    assert seen.counts == (1, 1)
    assert [path for path in opened if path.endswith(".png")] == []
    assert len([path for path in opened if path.endswith(".txt")]) >= images + 1  # the hook works


def test_an_edited_caption_copies_the_latents(settings, folder, monkeypatch):
    seen = watch_encoders(monkeypatch)
    precompute(settings)
    before = records(settings.shards_dir)
    seen.clear()
    (folder / "3.txt").write_text("an edited caption")
    with opened_files() as opened:
        summary = precompute(settings)
    assert (summary.written, summary.unchanged, summary.samples) == (1, 5, 6)
    assert (seen.images, seen.captions, seen.decoded) == ([], ["an edited caption"], [])
    assert [path for path in opened if path.endswith(".png")] == []
    after = records(settings.shards_dir)
    assert after["3.png"].meta.captions == ["an edited caption"]
    assert torch.equal(after["3.png"].tensors["latents"], before["3.png"].tensors["latents"])
    old, new = (each["3.png"].tensors["prompt_embeds.0"] for each in (before, after))
    assert not torch.equal(old, new[: len(old)])


def test_an_edited_caption_needs_no_vae_and_a_moved_one_no_encoder(
    settings, folder, no_encoders, monkeypatch
):
    from qwen_lora.families.qwen_image import QwenImage

    precompute(settings)
    before = records(settings.shards_dir)

    def refuse(*args, **kwargs):
        raise AssertionError("the VAE was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(QwenImage, "load_latent_encoder", refuse)
        (folder / "3.txt").write_text("an edited caption")
        assert precompute(settings).written == 1
    no_encoders()
    (folder / "4.txt").write_text("picture 5")  # every part of the new record is in the set
    assert precompute(settings).written == 1
    after = records(settings.shards_dir)["4.png"].tensors
    assert torch.equal(after["latents"], before["4.png"].tensors["latents"])
    assert torch.equal(after["prompt_embeds.0"], before["5.png"].tensors["prompt_embeds.0"])


def test_a_retired_record_serves_as_well(settings, folder, monkeypatch):
    """Caption A, then B, then C: the latents come from a record that may be retired."""
    precompute(settings)
    first = records(settings.shards_dir)["0.png"].tensors["latents"]
    seen = watch_encoders(monkeypatch)
    for caption in ("second", "third"):
        (folder / "0.txt").write_text(caption)
        assert precompute(settings).written == 1
        now = records(settings.shards_dir)
        assert now["0.png"].meta.captions == [caption]
        assert torch.equal(now["0.png"].tensors["latents"], first)
    assert (seen.images, seen.captions) == ([], ["second", "third"])


def test_one_of_several_captions_alone_is_encoded(make_settings, folder, monkeypatch):
    for path in folder.glob("*.txt"):
        path.write_text(f"shared by all\npicture {path.stem}\n")
    data = {"img_dir": folder, "img_size": [32], "caption_lines": "variants"}
    settings = make_settings(data)
    precompute(settings)
    before = records(settings.shards_dir)["2.png"].tensors
    seen = watch_encoders(monkeypatch)
    (folder / "2.txt").write_text("a third\nshared by all\npicture 2\n")
    assert precompute(settings).written == 1
    assert (seen.images, seen.captions) == ([], ["a third"])
    after = records(settings.shards_dir)["2.png"].tensors
    for old, new in (("0", "1"), ("1", "2")):
        assert torch.equal(before[f"prompt_embeds.{old}"], after[f"prompt_embeds.{new}"])


@pytest.mark.parametrize("placement", ["together", "sequential"])
def test_a_wider_recipe_encodes_images_alone(make_settings, folder, monkeypatch, placement):
    """Another resolution needs the VAE for the new sizes; the captions are there."""
    for path in sorted(folder.glob("*.png")):
        add_image(folder, path.stem, int(path.stem), f"picture {path.stem}", side=64)
    data = {"img_dir": folder, "img_size": [32]}
    precompute(make_settings(data, encoder_placement=placement))
    seen = watch_encoders(monkeypatch)
    wider = make_settings({**data, "img_size": [32, 64]}, encoder_placement=placement)
    summary = precompute(wider)
    assert (summary.written, summary.samples, summary.samples_written) == (6, 12, 6)
    assert seen.counts == (6, 0)
    with ShardSet.open(wider.shards_dir) as shards:
        assert shards.manifest.histograms["buckets"] == {"32x32": 6, "64x64": 6}
        assert shards.manifest.recipe["img_size"] == [32, 64]


@pytest.mark.parametrize("posterior", ["mode", "mean_std"])
def test_placements_copy_the_same(make_settings, folder, tmp_path, published, posterior):
    """Sequential runs keep embeddings aside between the encoders; the bytes are the same."""
    sets = [
        make_settings(
            {"img_dir": folder, "img_size": [32]},
            shards_dir=tmp_path / name,
            encoder_placement=name,
            vae_posterior=posterior,
        )
        for name in ("together", "sequential")
    ]
    for settings in sets:
        precompute(settings)
    (folder / "0.txt").write_text("edited")
    (folder / "1.txt").write_text("picture 2")
    add_image(folder, "new", 77, "picture 3")
    for settings in sets:
        assert precompute(settings).written == 3
    assert published(sets[0].shards_dir) == published(sets[1].shards_dir)
    assert not list((sets[1].shards_dir / ".local").glob("texts-*"))


def test_neither_names_nor_places_matter(settings, make_settings, folder, published, no_encoders):
    """Image files, the dataset and the set get other names and places: no encode, same bytes."""
    precompute(settings)
    before = published(settings.shards_dir)
    no_encoders()
    for old, new in (("0", "zero"), ("5", "a first name")):
        for suffix in (".png", ".txt"):
            (folder / f"{old}{suffix}").rename(folder / f"{new}{suffix}")
    moved = folder.parent / "elsewhere" / "renamed"
    moved.parent.mkdir()
    folder.rename(moved)
    place = moved.parent / "set"
    shutil.move(settings.shards_dir, place)
    again = make_settings({"img_dir": moved, "img_size": [32]}, shards_dir=place)
    summary = precompute(again)
    assert (summary.written, summary.unchanged, summary.samples) == (0, 6, 6)
    assert published(place) == before
    shutil.rmtree(place / ".local")  # a set that was downloaded has none
    assert precompute(again).unchanged == 6
    assert published(place) == before


def test_hashes_of_a_run_that_was_stopped_are_kept(settings, folder, monkeypatch):
    """Hashing a large dataset takes long; a stop in the middle must not begin it anew."""
    from qwen_lora.precompute import plan

    inspect_image = plan.inspect_image

    def stop_at_the_last(candidate, data):
        if candidate.image.name == "5.png":
            raise Stopped(signal.SIGINT)
        return inspect_image(candidate, data)

    monkeypatch.setattr(plan, "inspect_image", stop_at_the_last)
    with pytest.raises(Stopped):
        precompute(settings)
    looked_at = []

    def look(candidate, data):
        looked_at.append(candidate.image.name)
        return inspect_image(candidate, data)

    monkeypatch.setattr(plan, "inspect_image", look)
    assert precompute(settings).written == 6
    assert looked_at == ["5.png"]


def test_an_image_of_which_a_sample_failed_keeps_what_it_has(make_settings, folder, monkeypatch):
    """A disk that fails for a moment must not cost the record that is there."""
    from qwen_lora.precompute import encode

    precompute(make_settings({"img_dir": folder, "img_size": [16]}))
    (folder / "3.txt").write_text("another caption")
    wider = make_settings({"img_dir": folder, "img_size": [16, 32]})
    with monkeypatch.context() as patch:
        decode_image = encode.decode_image

        def fail(inspection, geometry, data):
            if inspection.candidate.image.name == "3.png":
                raise encode.DecodeError("unreadable", "Input/output error")
            return decode_image(inspection, geometry, data)

        patch.setattr(encode, "decode_image", fail)
        summary = precompute(wider)
    assert summary.retired == 0

    def captions() -> list[str]:
        with ShardSet.open(wider.shards_dir) as shards:
            metas = [shards.read_meta(row) for row in range(len(shards))]
        return sorted(meta.captions[0] for meta in metas if meta.source == "3.png")

    assert captions() == ["another caption", "picture 3"]
    assert precompute(wider).retired == 1
    assert captions() == ["another caption", "another caption"]
