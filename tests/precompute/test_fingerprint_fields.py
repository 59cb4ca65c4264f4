"""Each fact of a fingerprint, changed alone: the rerun is refused with that field, old and new."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from changing_sets import add_image

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image import constants
from qwen_lora.precompute import fingerprint as fingerprints
from qwen_lora.precompute.fingerprint import check_fingerprint
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.format import Fingerprint, Manifest
from qwen_lora.shards.manifest import load_manifest

Change = Callable[["Rerun"], None]


class Rerun:
    """A set that is there, and the next run's model and settings, which a test changes."""

    def __init__(self, settings: Settings, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.model, self.patch = model, patch
        self.settings = settings.model_copy(update={"pretrained_model_name_or_path": str(model)})

    def set(self, **changes: object) -> None:
        self.settings = self.settings.model_copy(update=changes)

    def set_data(self, **changes: object) -> None:
        self.set(data_config=self.settings.data_config.model_copy(update=changes))

    def edit(self, name: str, *keys: str, value: Any) -> None:
        path = self.model / name
        facts = json.loads(path.read_text())
        inner = facts
        for key in keys[:-1]:
            inner = inner[key]
        assert inner[keys[-1]] != value
        inner[keys[-1]] = value
        path.write_text(json.dumps(facts))


def vae(key: str, value: Any) -> Change:
    return lambda rerun: rerun.edit("vae/config.json", key, value=value)


def text(*keys: str, value: Any) -> Change:
    return lambda rerun: rerun.edit("text_encoder/config.json", "text_config", *keys, value=value)


def last_byte(name: str) -> Change:
    def change(rerun: Rerun) -> None:
        (path,) = rerun.model.glob(name)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    return change


def one_more_byte(name: str) -> Change:
    def change(rerun: Rerun) -> None:
        with open(rerun.model / name, "ab") as file:
            file.write(b"\n")

    return change


def constant(name: str, value: object) -> Change:
    """What another release of this program may do differently."""
    return lambda rerun: rerun.patch.setattr(constants, name, value)


def stored(name: str) -> Change:
    return lambda rerun: rerun.patch.setattr(fingerprints, name, "float32")


LONGER_TEMPLATE = constants.TEMPLATE_TAIL + "\n"
MEANS = "vae.config.latents_mean"
CHANGES: dict[str, Change] = {
    "vae.config.base_dim": vae("base_dim", 16),
    "vae.config.dim_mult": vae("dim_mult", [1, 2, 4, 8]),
    "vae.config.num_res_blocks": vae("num_res_blocks", 2),
    "vae.config.attn_scales": vae("attn_scales", [0.25]),
    "vae.config.temperal_downsample": vae("temperal_downsample", [True, True, True]),
    MEANS: vae("latents_mean", [0.5] * 16),
    "vae.config.latents_std": vae("latents_std", [2.5] * 16),
    "vae.weights": last_byte("vae/*.safetensors"),
    "vae.compute_dtype": lambda rerun: rerun.set(vae_dtype="bfloat16"),
    "vae.stored_dtype": stored("LATENT_DTYPE"),
    "vae.posterior": lambda rerun: rerun.set(vae_posterior="mean_std"),
    "vae.resize": lambda rerun: rerun.set_data(resize="exact"),
    "vae.alpha_background": lambda rerun: rerun.set_data(alpha_background="#000000"),
    "text.config.hidden_size": text("hidden_size", value=32),
    "text.config.intermediate_size": text("intermediate_size", value=64),
    "text.config.num_hidden_layers": text("num_hidden_layers", value=1),
    "text.config.num_attention_heads": text("num_attention_heads", value=8),
    "text.config.num_key_value_heads": text("num_key_value_heads", value=4),
    "text.config.hidden_act": text("hidden_act", value="gelu"),
    "text.config.rms_norm_eps": text("rms_norm_eps", value=1e-5),
    "text.config.vocab_size": text("vocab_size", value=1001),
    "text.config.rope_theta": text("rope_parameters", "rope_theta", value=1e4),
    "text.config.mrope_section": text("rope_parameters", "mrope_section", value=[4, 2, 2]),
    "text.tokenizer.tokenizer.json": one_more_byte("tokenizer/tokenizer.json"),
    "text.tokenizer.tokenizer_config.json": one_more_byte("tokenizer/tokenizer_config.json"),
    "text.template": constant("TEMPLATE_TAIL", LONGER_TEMPLATE),
    "text.dropped_tokens": constant("DROPPED_TOKENS", 33),
    "text.max_tokens": constant("MAX_TOKENS", 512),
    "text.weights": last_byte("text_encoder/*.safetensors"),
    "text.compute_dtype": lambda rerun: rerun.set(text_encoder_dtype="float32"),
    "text.quantization": lambda rerun: rerun.set(text_encoder_quantization="nf4"),
    "text.stored_dtype": stored("EMBEDS_DTYPE"),
}
# No model of this family can differ in these and get that far.
FIXED = {"format": 1, "family": "qwen-image", "vae.config.z_dim": 16}


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Those of a finished set of two images."""
    folder = tmp_path_factory.mktemp("fields")
    for index in range(2):
        add_image(folder / "images", f"{index}", index, f"picture {index}")
    settings = Settings(
        pretrained_model_name_or_path=str(tiny_model),
        data_config=DataConfig(img_dir=folder / "images", img_size=[32]),
        shards_dir=folder / "shards",
        encode_threads=1,
    )
    precompute(settings)
    return settings


@pytest.fixture
def rerun(settings: Settings, tiny_model: Path, tmp_path: Path, monkeypatch) -> Rerun:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(tiny_model / "model_index.json", model)
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_model / name, model / name)
    return Rerun(settings, model, monkeypatch)


def test_an_equal_model_elsewhere_is_the_same(rerun: Rerun) -> None:
    assert precompute(rerun.settings).unchanged == 2


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_field_is_refused(rerun: Rerun, field: str, no_encoders, published) -> None:
    folder = Path(rerun.settings.shards_dir)
    before = published(folder)
    CHANGES[field](rerun)
    no_encoders()
    with pytest.raises(InputError) as refused:
        precompute(rerun.settings)
    message = str(refused.value)
    named = re.fullmatch(r".* was made with other encoders: (\S+) (.+) -> (.+); name .*", message)
    assert named is not None, message
    assert named[1] == field
    assert named[2] != named[3]
    if field == MEANS:  # the first of 16, as the model's config has it
        assert named[3] == "[" + ", ".join(["0.5"] * 16) + "]"
    assert published(folder) == before


def test_no_field_is_left_out(settings: Settings) -> None:
    manifest, _ = load_manifest(Path(settings.shards_dir))
    facts = fingerprints._fingerprint_facts(manifest.fingerprint)
    assert facts.keys() == CHANGES.keys() | FIXED.keys()
    assert {name: facts[name] for name in FIXED} == FIXED


@pytest.mark.parametrize("field", FIXED)
def test_a_set_that_differs_in_a_fixed_fact_is_refused(settings: Settings, field: str) -> None:
    manifest, _ = load_manifest(Path(settings.shards_dir))
    facts = asdict(manifest.fingerprint)
    if field == "vae.config.z_dim":
        facts["vae"]["config"]["z_dim"] = 64
    else:
        facts["format_major" if field == "format" else field] = {"format": 2}.get(field, "other")
    other: Manifest = replace(manifest, fingerprint=Fingerprint(**facts))
    with pytest.raises(InputError, match=rf"{re.escape(field)} (64|2|other) -> {FIXED[field]};"):
        check_fingerprint(other, manifest.fingerprint, Path("shards"))


def test_several_fields_are_all_named(rerun: Rerun, no_encoders) -> None:
    fields = ["vae.compute_dtype", "text.template", "text.weights"]
    for field in fields:
        CHANGES[field](rerun)
    no_encoders()
    with pytest.raises(InputError) as refused:
        precompute(rerun.settings)
    named = re.findall(r"([a-z_]+\.[a-z_.]+) [^,;]+ -> [^,;]+[,;]", str(refused.value))
    assert named == sorted(fields)
    assert "\n" not in str(refused.value)


def test_long_texts_are_cut_to_where_they_differ(rerun: Rerun) -> None:
    CHANGES["text.template"](rerun)
    with pytest.raises(InputError) as refused:
        precompute(rerun.settings)
    shown = re.search(r"text\.template (.+) -> (.+); name", str(refused.value))
    assert shown is not None
    assert shown[1].endswith("istant\\n") and shown[2].endswith("istant\\n\\n")
    assert len(shown[1]) < 60
