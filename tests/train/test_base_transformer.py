"""The frozen transformer: found without encoders, checked against shards, in the right type."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.base import Recompute
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.train.transformer import (
    check_transformer,
    choose_dtype,
    forward_options,
    load_base,
)

CPU = torch.device("cpu")
COMPONENTS = ("transformer", "scheduler")


@pytest.fixture
def model(transformer_only: Path) -> ModelFolder:
    return resolve_model(str(transformer_only), COMPONENTS)


def test_no_encoder_is_constructed(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformer_only` has no folder of theirs, either."""
    import diffusers
    import transformers

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{type(self).__name__} was constructed")

    monkeypatch.setattr(diffusers.AutoencoderKLQwenImage, "__init__", refuse)
    for name in ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel", "Qwen2_5_VLTextModel"):
        monkeypatch.setattr(getattr(transformers, name), "__init__", refuse)
    assert {path.name for path in model.path.iterdir()} == {*COMPONENTS, "model_index.json"}
    transformer = load_base(model, Settings(), CPU)
    assert type(transformer).__name__ == "QwenImageTransformer2DModel"
    assert not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


@pytest.mark.parametrize(
    ("mixed_precision", "dtype"),
    [("auto", torch.float32), ("no", torch.float32), ("bf16", torch.bfloat16)],
)
def test_type_on_a_cpu(model: ModelFolder, mixed_precision: Any, dtype: torch.dtype) -> None:
    settings = Settings(mixed_precision=mixed_precision)
    assert choose_dtype(settings, CPU) == dtype
    loaded = load_base(model, settings, CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_type_on_a_gpu(has: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert choose_dtype(Settings(), torch.device("cuda")) == dtype
    assert choose_dtype(Settings(mixed_precision="fp16"), torch.device("cuda")) == torch.float16


def test_float16_warns(model: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    load_base(model, Settings(mixed_precision="bf16"), CPU)
    assert capsys.readouterr().err == ""
    load_base(model, Settings(mixed_precision="fp16"), CPU)
    assert "overflow float16" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_is_a_setting(model: ModelFolder, on: bool, own: bool) -> None:
    settings = Settings(gradient_checkpointing=on, own_forward=own)
    loaded: Any = load_base(model, settings, CPU)
    recompute = Recompute("full" if on else "none")
    model.family.prepare_training(loaded, forward_options(settings, recompute))
    assert loaded.is_gradient_checkpointing == (on and not own)
    assert hasattr(loaded, "own_forward") == own
    assert not own or loaded.own_forward.recompute.kind == ("full" if on else "none")


def test_the_shards_decide_what_fits(model: ModelFolder, train_shards: Path) -> None:
    manifest, _ = load_manifest(train_shards)
    check_transformer(model, [manifest, manifest])
    # Another model id is fine.
    check_transformer(model, [dataclasses.replace(manifest, model={"id": "some/other"})])
    wrong = {
        r"text width 7 in the shards, \d+ in the transformer": {"text_width": 7},
        "latent channels 4 in the shards, 16 in the transformer": {"latent_channels": 4},
        "family other in the shards, qwen-image in the transformer": {
            "fingerprint": dataclasses.replace(manifest.fingerprint, family="other")
        },
    }
    for said, change in wrong.items():
        with pytest.raises(InputError, match=said):
            check_transformer(model, [manifest, dataclasses.replace(manifest, **change)])


def test_another_transformer_class_is_refused(model: ModelFolder, tmp_path: Path) -> None:
    shutil.copytree(model.path, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    changed = {**json.loads(config.read_text()), "_class_name": "FluxTransformer2DModel"}
    config.write_text(json.dumps(changed))
    other = resolve_model(str(tmp_path / "model"), COMPONENTS)
    with pytest.raises(InputError, match="is a FluxTransformer2DModel"):
        check_transformer(other, [])
