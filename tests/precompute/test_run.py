"""Stage 1 from folder to shard set, on the tiny model."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwen_lora.precompute.run import precompute
from qwen_lora.shards.reader import ShardSet


def read_all(folder: Path) -> dict:
    """source name -> record, for every live sample"""
    shards = ShardSet.open(folder)
    records = [shards.read(row) for row in range(len(shards.table.sample_id))]
    shards.close()
    return {record.meta.source: record for record in records}


def report(folder: Path) -> dict[str, dict]:
    lines = (folder / ".local" / "report.jsonl").read_text().splitlines()
    return {row["file"]: row for row in map(json.loads, lines)}


def test_a_folder_becomes_a_set_and_a_rerun_loads_no_model(
    make_settings, no_encoders, capsys, published
):
    settings = make_settings()
    threads = torch.get_num_threads()
    summary = precompute(settings)
    assert (summary.seen, summary.written, summary.skipped, summary.exit_code) == (12, 12, 0, 0)
    assert summary.samples == summary.samples_written == 12
    assert "12 files seen = 12 written" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    records = read_all(settings.shards_dir)
    assert len(records) == 12
    assert records["00.png"].meta.captions == ["a red picture with a small square, number 0"]
    assert not list((settings.shards_dir / ".local").glob("*.tmp"))

    before = published(settings.shards_dir)
    no_encoders()
    again = precompute(settings)
    assert (again.written, again.unchanged, again.exit_code) == (0, 12, 0)
    assert (again.samples, again.samples_written) == (12, 0)
    assert published(settings.shards_dir) == before


def test_records_equal_diffusers(make_settings, tiny_model):
    """Stored latents and embeddings are within half an ulp of diffusers' own float32 results."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    from qwen_lora.precompute.images import decode_image
    from qwen_lora.precompute.types import Candidate, ImageSource, Inspection
    from qwen_lora.shards.format import Geometry

    settings = make_settings(text_encoder_dtype="float32")
    precompute(settings)
    vae = AutoencoderKLQwenImage.from_pretrained(str(tiny_model), subfolder="vae")
    pipe = QwenImagePipeline.from_pretrained(str(tiny_model), vae=None, transformer=None)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    for name, record in read_all(settings.shards_dir).items():
        meta = record.meta
        source = ImageSource(name, settings.data_config.img_dir / name)
        inspection = Inspection(
            Candidate(source, tuple(meta.captions)), meta.source_sha256, meta.original_size
        )
        geometry = Geometry(meta.crop_box, meta.bucket, meta.flipped)
        pixels = decode_image(inspection, geometry, settings.data_config)
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
        with torch.no_grad():
            reference = ((vae.encode(x).latent_dist.mode() - mean) / std)[0, :, 0]
            embeds, mask = pipe.encode_prompt(meta.captions[0])
        latents = record.tensors["latents"]
        assert latents.dtype == torch.float16
        half_ulp = reference.abs().clamp(min=2**-14) * 2**-11 + 1e-4
        assert ((latents.float() - reference).abs() <= half_ulp).all()
        stored = record.tensors["prompt_embeds.0"]
        assert stored.dtype == torch.bfloat16
        assert stored.shape == embeds[0].shape
        half_ulp = embeds[0].abs() * 2**-8 + 1e-5
        assert ((stored.float() - embeds[0]).abs() <= half_ulp).all()
        assert record.tensors["prompt_mask.0"].all()


def test_the_unconditional_embedding_is_the_empty_prompt(make_settings, tiny_model):
    from diffusers import QwenImagePipeline

    settings = make_settings(text_encoder_dtype="float32")
    precompute(settings)
    pipe = QwenImagePipeline.from_pretrained(str(tiny_model), vae=None, transformer=None)
    with torch.no_grad():
        expected = pipe.encode_prompt(" ")[0][0]
    shards = ShardSet.open(settings.shards_dir)
    embeds, mask = shards.unconditional()
    shards.close()
    assert ((embeds.float() - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()
    assert mask.all()


@pytest.mark.parametrize("placement", ["sequential", "offload"])
def test_placement_changes_no_byte(make_settings, tmp_path, placement, published):
    together = make_settings(encoder_placement="together", shards_dir=tmp_path / "together")
    other = make_settings(encoder_placement=placement, shards_dir=tmp_path / "other")
    precompute(together)
    precompute(other)
    assert published(other.shards_dir) == published(together.shards_dir)
    assert not list((other.shards_dir / ".local").glob("texts-*"))


def test_mean_and_std_are_stored_on_request(make_settings):
    settings = make_settings(vae_posterior="mean_std")
    precompute(settings)
    for record in read_all(settings.shards_dir).values():
        assert "latents" not in record.tensors
        assert record.tensors["posterior_mean"].dtype == torch.float16
        assert (record.tensors["posterior_std"] > 0).all()


def test_names_and_captions_can_stay_out(make_settings):
    settings = make_settings(captions_in_shards=False, source_names=False)
    precompute(settings)
    for path in settings.shards_dir.glob("shard-*"):
        data = path.read_bytes()
        assert b"picture" not in data
        assert b".png" not in data


def test_the_saved_settings_hold_no_secret(make_settings):
    """A token that somebody has put where none belongs."""
    settings = make_settings({"trigger_word": "hf_CanaryCanary12"}, captions_in_shards=False)
    precompute(settings)
    saved = (settings.shards_dir / ".local" / "settings.json").read_text()
    assert "Canary" not in saved
    assert json.loads(saved)["data_config"]["trigger_word"] == "***"


def test_two_resolutions_and_flips_make_more_samples_not_more_files(make_settings):
    settings = make_settings({"img_size": [64, 96], "flip": "both"})
    summary = precompute(settings)
    assert summary.written == 12
    assert summary.samples > 24


def test_bad_files_are_reported_and_the_rest_is_encoded(make_settings, dataset, no_encoders):
    shutil.copy(dataset / "00.png", dataset / "copy.png")
    shutil.copy(dataset / "00.txt", dataset / "copy.txt")
    whole = (dataset / "01.png").read_bytes()
    (dataset / "broken.png").write_bytes(whole[: len(whole) // 2])
    (dataset / "broken.txt").write_text("a broken picture")
    (dataset / "text.png").write_text("no picture")
    (dataset / "text.txt").write_text("no picture")
    Image.new("RGB", (90, 90)).save(dataset / "no-caption.png")
    settings = make_settings({"img_dir": dataset})
    summary = precompute(settings)
    assert summary.seen == 8
    assert (summary.written, summary.duplicate, summary.skipped) == (4, 1, 3)
    assert summary.exit_code == 0
    rows = report(settings.shards_dir)
    assert set(rows) == {"broken.png", "text.png", "no-caption.png", "copy.png"}
    assert rows["copy.png"] == {
        "file": "copy.png",
        "outcome": "duplicate",
        "reason": "duplicate",
        "detail": "00.png",
    }
    no_encoders()  # failures are remembered, too
    again = precompute(settings)
    assert (again.unchanged, again.duplicate, again.skipped) == (4, 1, 3)
    assert set(report(settings.shards_dir)) == set(rows)
    strict = precompute(make_settings({"img_dir": dataset}, max_skip=2))
    assert strict.exit_code == 1


def test_nothing_usable_publishes_nothing(make_settings, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    (folder / "a.txt").write_text("a caption")
    settings = make_settings({"img_dir": folder})
    summary = precompute(settings)
    assert summary.exit_code == 1
    assert summary.manifest is None
    assert not (settings.shards_dir / "manifest.json").exists()


def test_nonfinite_latents_are_refused_by_sample(make_settings, dataset, monkeypatch):
    from qwen_lora.families.qwen_image.vae import QwenLatentEncoder

    encode = QwenLatentEncoder.encode
    calls = []

    def spoil_the_first(self, pixels):
        encoded = encode(self, pixels)
        if not calls:
            encoded.mean[0, 0, 0, 0] = 1e6  # finite, but not in float16
        calls.append(len(pixels))
        return encoded

    monkeypatch.setattr(QwenLatentEncoder, "encode", spoil_the_first)
    settings = make_settings({"img_dir": dataset})
    summary = precompute(settings)
    assert (summary.written, summary.skipped, summary.reasons) == (3, 1, {"nonfinite": 1})
    assert len(read_all(settings.shards_dir)) == 3


def test_nonfinite_embeddings_are_refused_by_sample(make_settings, dataset, monkeypatch):
    from qwen_lora.families.qwen_image.text import QwenPromptEncoder

    encode = QwenPromptEncoder.encode

    def spoil_number_two(self, captions):
        encoded = encode(self, captions)
        for caption, result in zip(captions, encoded, strict=True):
            if caption.endswith("number 2"):
                result.prompt_embeds[-1, 0] = float("nan")
        return encoded

    monkeypatch.setattr(QwenPromptEncoder, "encode", spoil_number_two)
    settings = make_settings({"img_dir": dataset})
    summary = precompute(settings)
    assert (summary.written, summary.skipped) == (3, 1)
    assert report(settings.shards_dir)["02.png"]["reason"] == "nonfinite"


def test_an_empty_caption_trains_the_empty_prompt(make_settings, dataset):
    (dataset / "00.txt").write_text("  \n")
    skipped = precompute(make_settings({"img_dir": dataset}))
    assert (skipped.written, skipped.skipped) == (3, 1)
    settings = make_settings({"img_dir": dataset, "empty_caption": "unconditional"})
    assert precompute(settings).written == 1
    record = read_all(settings.shards_dir)["00.png"]
    shards = ShardSet.open(settings.shards_dir)
    embeds, _ = shards.unconditional()
    shards.close()
    assert torch.allclose(record.tensors["prompt_embeds.0"].float(), embeds.float(), atol=0.02)


def test_new_images_are_appended(make_settings, dataset, image_folder, published):
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    first = published(settings.shards_dir)
    for name in ("06.png", "06.txt"):
        shutil.copy(image_folder / name, dataset)
    summary = precompute(settings)
    assert (summary.written, summary.unchanged, summary.samples) == (1, 4, 5)
    after = published(settings.shards_dir)
    assert {name: after[name] for name in first if name != "manifest.json"} == {
        name: data for name, data in first.items() if name != "manifest.json"
    }
    (dataset / "06.png").unlink()
    gone = precompute(settings)
    assert (gone.unchanged, gone.samples) == (4, 5)  # images that a scan does not see stay


def test_a_changed_caption_supersedes_the_old_record(make_settings, dataset):
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    (dataset / "00.txt").write_text("an entirely new caption")
    summary = precompute(settings)
    assert (summary.written, summary.unchanged, summary.samples) == (1, 3, 4)
    records = read_all(settings.shards_dir)
    assert len(records) == 4
    assert records["00.png"].meta.captions == ["an entirely new caption"]
    (dataset / "00.txt").write_text("a red picture with a small square, number 0")
    back = precompute(settings)  # the old record is still there and counts again
    assert (back.written, back.unchanged, back.samples) == (0, 4, 4)
    assert read_all(settings.shards_dir)["00.png"].meta.captions[0].endswith("number 0")


def test_a_resolution_can_be_added(make_settings, dataset):
    settings = make_settings({"img_dir": dataset, "img_size": [96, 64]})
    precompute(make_settings({"img_dir": dataset}))
    summary = precompute(settings)
    assert summary.written + summary.unchanged == 4
    assert summary.samples == 4 + summary.samples_written > 4
    shards = ShardSet.open(settings.shards_dir)
    assert shards.manifest.recipe["img_size"] == [64, 96]
    shards.close()


def test_several_captions_stand_in_one_record(make_settings, dataset, monkeypatch):
    from qwen_lora.families.qwen_image.text import QwenPromptEncoder

    for path in dataset.glob("*.txt"):
        path.write_text(f"a caption that all share\npicture {path.stem}\n")
    encode, encoded = QwenPromptEncoder.encode, []

    def count(self, captions):
        encoded.extend(captions)
        return encode(self, captions)

    monkeypatch.setattr(QwenPromptEncoder, "encode", count)
    settings = make_settings({"img_dir": dataset, "caption_lines": "variants"})
    precompute(settings)
    assert encoded.count("a caption that all share") == 1  # once a shard
    for name, record in read_all(settings.shards_dir).items():
        assert record.meta.captions == ["a caption that all share", f"picture {name[:2]}"]
        assert {"prompt_embeds.0", "prompt_embeds.1"} <= record.tensors.keys()


def test_a_tar_gives_the_samples_of_its_folder(make_settings, dataset, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "images.tar", "w") as tar:
        for path in sorted(dataset.iterdir()):
            tar.add(path, path.name)
    folder = make_settings({"img_dir": dataset}, shards_dir=tmp_path / "from-folder")
    archive = make_settings({"img_dir": packed}, shards_dir=tmp_path / "from-tar")
    assert precompute(folder).written == precompute(archive).written == 4
    ids = []
    for settings in (folder, archive):
        with ShardSet.open(settings.shards_dir) as shards:
            ids.append(sorted(shards.table.sample_id))
    assert ids[0] == ids[1]


def test_a_caption_given_twice_stands_twice(make_settings, dataset):
    (dataset / "00.txt").write_text("the same\nanother\nthe same\n")
    settings = make_settings({"img_dir": dataset, "caption_lines": "variants"})
    assert precompute(settings).written == 4
    record = read_all(settings.shards_dir)["00.png"]
    assert record.meta.captions == ["the same", "another", "the same"]
    first, third = record.tensors["prompt_embeds.0"], record.tensors["prompt_embeds.2"]
    assert torch.equal(first, third) and len(first) == len(record.tensors["prompt_mask.2"])


def test_an_image_in_another_folder_keeps_its_group_and_that_is_said(
    make_settings, dataset, capsys, no_encoders
):
    (dataset / "10_cat").mkdir()
    for name in ("00.png", "00.txt"):
        (dataset / name).rename(dataset / "10_cat" / name)
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    assert "another folder" not in capsys.readouterr().err
    (dataset / "10_cat").rename(dataset / "20_cat")
    no_encoders()
    for dry_run in (True, False):
        assert precompute(settings, dry_run=dry_run).unchanged == 4
        told = capsys.readouterr().err
        assert "1 samples lie in another folder now (10_cat -> 20_cat)" in told
    assert read_all(settings.shards_dir)["10_cat/00.png"].meta.group == "10_cat"
