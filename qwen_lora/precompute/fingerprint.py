"""What shapes the tensors, what shapes the images, and what a rerun must not change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen_lora import __version__
from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.errors import InputError
from qwen_lora.models import ModelFolder
from qwen_lora.precompute.images import RESIZE_ALGORITHM, SCALED_DECODE
from qwen_lora.shards.format import Fingerprint, Manifest
from qwen_lora.shards.safe import printable
from qwen_lora.weight_hashes import weight_hashes

LATENT_DTYPE = "float16"
EMBEDS_DTYPE = "bfloat16"
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "opencv-python-headless")
RECIPE_KEYS = (
    "bucket_step",
    "square",
    "min_aspect",
    "max_aspect",
    "upscale",
    "flip",
    "random_ratio",
)
SHOWN_WHOLE, SHOWN_CUT, SHOWN_BEFORE = 40, 24, 8  # characters of a value in a refusal
PRIVACY_KEYS = ("captions_in_shards", "source_names")  # settings that leave facts out


def make_fingerprint(
    model: ModelFolder, settings: Settings, hashes: Path | None = None
) -> Fingerprint:
    """Hash the encoders' weights (remembered in `hashes`) and gather the facts around them."""
    facts, chosen = model.family.encoder_facts(model), chosen_facts(settings)
    vae = {**facts["vae"], "weights": _weights(model, "vae", hashes), **chosen["vae"]}
    text = {**facts["text"], "weights": _weights(model, "text_encoder", hashes)}
    return Fingerprint(model.family.name, vae, {**text, **chosen["text"]})


def chosen_facts(settings: Settings) -> dict[str, dict[str, Any]]:
    """The part of a fingerprint that the settings alone decide, for `vae` and `text`."""
    vae = {
        "compute_dtype": settings.vae_dtype,
        "stored_dtype": LATENT_DTYPE,
        "posterior": settings.vae_posterior,
        **pixel_facts(settings.data_config),
    }
    text = {
        "compute_dtype": settings.text_encoder_dtype,
        "quantization": settings.text_encoder_quantization,
        "stored_dtype": EMBEDS_DTYPE,
    }
    return {"vae": vae, "text": text}


def _weights(model: ModelFolder, component: str, hashes: Path | None) -> list[str]:
    return sorted(weight_hashes(model.component(component), hashes).values())


def pixel_facts(data: DataConfig) -> dict[str, str]:
    """How a decoded image becomes a bucket's pixels, as names that change with the algorithm."""
    scaled = f"+{SCALED_DECODE}" if data.jpeg_scaled_decode else ""
    return {
        "resize": RESIZE_ALGORITHM[data.resize] + scaled,
        "alpha_background": data.alpha_background.lower(),
    }


def made_by(settings: Settings, device_type: str) -> dict[str, Any]:
    """What may move the last bits of a record: told in every sidecar, compared by nobody."""
    versions = {"qwen_lora": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **versions,
        "device": device_type,
        "encode_threads": settings.encode_threads,
        "vae_batch_size": settings.vae_batch_size,
        "text_batch_size": settings.text_batch_size,
        "text_prefix_cache": settings.text_prefix_cache,
    }


def make_recipe(settings: Settings) -> dict[str, Any]:
    """Resolutions, bucket, crop and flip rules, under the names of the settings."""
    data = settings.data_config
    recipe: dict[str, Any] = {"img_size": sorted(set(data.img_size))}
    recipe.update({key: getattr(data, key) for key in RECIPE_KEYS})
    if data.random_ratio:
        recipe["seed"] = settings.seed
    # Named only when something is left out: a set that was to hold no captions must not get some
    # later, and one that holds them does not lose them by a rerun.
    recipe.update({key: False for key in PRIVACY_KEYS if not getattr(settings, key)})
    return recipe


def check_fingerprint(manifest: Manifest, fingerprint: Fingerprint, label: str) -> None:
    """Raises InputError naming every fact in which the encoders differ, old -> new."""
    if manifest.fingerprint.hash == fingerprint.hash:
        return
    old, new = _fingerprint_facts(manifest.fingerprint), _fingerprint_facts(fingerprint)
    raise InputError(
        f"{label} was made with other encoders: {_differences(old, new)}; "
        "name another --output or go back to the old values"
    )


def check_recipe(manifest: Manifest, recipe: Mapping[str, Any], label: str) -> None:
    """Raises InputError unless `recipe` is the set's own with perhaps more resolutions."""
    old, new = dict(manifest.recipe), dict(recipe)
    if not set(old.pop("img_size", [])) <= set(new.pop("img_size")):
        raise InputError(
            f"{label} has images of img_size {manifest.recipe['img_size']}, now asked for "
            f"{recipe['img_size']}; resolutions can be added, not taken away: "
            "name all of them, or another --output"
        )
    for key in PRIVACY_KEYS:
        old.setdefault(key, True)
        new.setdefault(key, True)
    if old != new:
        raise InputError(
            f"{label} was made by other rules: {_differences(_flat(old), _flat(new))}; "
            "name another --output or go back to the old values"
        )


def _fingerprint_facts(fingerprint: Fingerprint) -> dict[str, Any]:
    return _flat(
        {
            "format": fingerprint.format_major,
            "family": fingerprint.family,
            "vae": fingerprint.vae,
            "text": fingerprint.text,
        }
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: list(value) if isinstance(value, tuple) else value}
    facts: dict[str, Any] = {}
    for key, inner in value.items():
        facts.update(_flat(inner, f"{name}.{key}" if name else str(key)))
    return facts


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {_shown(old.get(name), new.get(name))}" for name in names)


def _shown(old: Any, new: Any) -> str:
    """`old -> new`, long texts cut to where they differ."""
    if isinstance(old, str) and isinstance(new, str):
        begin = max(0, len(os.path.commonprefix([old, new])) - SHOWN_BEFORE)
        return f"{_short(old, begin)} -> {_short(new, begin)}"
    return f"{_short(old)} -> {_short(new)}"


def _short(value: Any, begin: int = 0) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, list):
        return "[" + ", ".join(_short(each) for each in value) + "]"
    text = str(value)
    if len(text) > SHOWN_WHOLE:
        end = begin + SHOWN_CUT
        text = "..." * (begin > 0) + text[begin:end] + "..." * (end < len(text))
    return printable(text)
