import shutil
from dataclasses import replace

import pytest

from qwen_lora.errors import InputError
from qwen_lora.models import resolve_model
from qwen_lora.precompute.fingerprint import (
    check_recipe,
    made_by,
    make_fingerprint,
    make_recipe,
)
from qwen_lora.precompute.plan import ENCODER_PARTS
from qwen_lora.shards.format import FileEntry, Fingerprint, Manifest


@pytest.fixture
def fingerprint_of(make_settings, tiny_model, tmp_path):
    def make(model=tiny_model, data=None, **changes) -> Fingerprint:
        found = resolve_model(str(model), ENCODER_PARTS)
        return make_fingerprint(found, make_settings(data, **changes), tmp_path / "weights.json")

    return make


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"vae_dtype": "bfloat16"}, "vae"),
        ({"vae_posterior": "mean_std"}, "vae"),
        ({"data": {"resize": "exact"}}, "vae"),
        ({"data": {"jpeg_scaled_decode": True}}, "vae"),
        ({"data": {"alpha_background": "#000000"}}, "vae"),
        ({"text_encoder_dtype": "float32"}, "text"),
        ({"text_encoder_quantization": "nf4"}, "text"),
    ],
)
def test_what_shapes_the_tensors_is_in_it(fingerprint_of, change, part):
    base, other = fingerprint_of(), fingerprint_of(**change)
    assert (base.vae_hash != other.vae_hash) is (part == "vae")
    assert (base.text_hash != other.text_hash) is (part == "text")


@pytest.mark.parametrize(
    "change",
    [
        {
            "encode_threads": 7,
            "vae_batch_size": 9,
            "text_batch_size": 9,
            "text_prefix_cache": False,
        },
        {"encoder_placement": "offload"},
        {"data": {"img_size": [64], "flip": "both", "alpha_background": "#FFFFFF"}},
    ],
)
def test_what_does_not_is_not(fingerprint_of, change):
    assert fingerprint_of(**change) == fingerprint_of()


def test_neither_place_nor_file_names_matter(fingerprint_of, tiny_model, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, moved)
    shutil.rmtree(moved / "transformer")
    assert fingerprint_of(moved) == fingerprint_of()


def test_a_recipe_only_grows(make_settings, tmp_path):
    entry = FileEntry("unconditional-0.safetensors", 1, "0")
    manifest = Manifest(
        fingerprint=Fingerprint("some-family", {}, {}),
        latent_channels=1,
        latent_scale=1,
        text_width=1,
        posterior="mode",
        model={},
        recipe=make_recipe(make_settings({"img_size": [96]})),
        shards=(),
        unconditional=entry,
        counts={},
        histograms={},
    )
    check_recipe(manifest, make_recipe(make_settings({"img_size": [64, 96]})), tmp_path)
    check_recipe(manifest, make_recipe(make_settings({"img_size": [96]}, seed=5)), tmp_path)
    with pytest.raises(InputError, match="random_ratio False -> True"):
        check_recipe(manifest, make_recipe(make_settings({"random_ratio": True})), tmp_path)
    random = make_settings({"img_size": [96], "random_ratio": True})
    drawn = replace(manifest, recipe=make_recipe(random))
    with pytest.raises(InputError, match="seed 0 -> 5"):
        changed = make_settings({"img_size": [96], "random_ratio": True}, seed=5)
        check_recipe(drawn, make_recipe(changed), tmp_path)


def test_made_by_names_versions_and_batches(make_settings):
    facts = made_by(make_settings(encode_threads=3), "cpu")
    assert facts["encode_threads"] == 3
    assert facts["device"] == "cpu"
    assert {"qwen_lora", "torch", "diffusers", "transformers"} <= facts.keys()
