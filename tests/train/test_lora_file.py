"""The LoRA file: with it diffusers, and everyone else, computes what the trainer computed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_model import LoraModel, lora_model, predict, shake
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.train.export import canonical_header, read_lora, save_lora
from qwen_lora.train.lora import lora_layers

SCALES: list[dict[str, Any]] = [
    {},
    {"lora_alpha": 11, "lora_dropout": 0.5},
    {"lora_alpha": 3, "use_rslora": True},
    {"lora_alpha": 0.5, "lora_init": "orthogonal", "lora_targets": "all-linear+mod"},
]
IDS = ["alpha-is-rank", "alpha-and-dropout", "rslora", "all-linear"]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(tiny_model)


def trained(folder: Path, **changes: Any) -> tuple[LoraModel, torch.Tensor]:
    """A LoRA that matters, and what the trainer predicts with it."""
    made = lora_model(folder, **changes)
    with torch.no_grad():
        plain = made.predict()
        shake(made)
        prediction = made.transformer.eval() and made.predict()
    assert relative(prediction, plain) > 0.05
    return made, prediction


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


@pytest.mark.parametrize("changes", SCALES, ids=IDS)
def test_diffusers_predicts_what_the_trainer_predicted(
    pipeline: Any, transformer_only: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    made, expected = trained(transformer_only, **changes)
    path = tmp_path / "lora.safetensors"
    save_lora(path, made.transformer, made.spec)
    pipeline.load_lora_weights(path)
    try:
        # Nobody but the layers that were trained has become one, and none drops anything out.
        assert [*lora_layers(pipeline.transformer)] == [*lora_layers(made.transformer)]
        with torch.no_grad():
            theirs = predict(made.model, pipeline.transformer)
    finally:
        pipeline.unload_lora_weights()
    assert relative(theirs, expected) < 1e-5


@pytest.mark.parametrize("changes", SCALES, ids=IDS)
def test_readers_without_metadata_agree(
    pipeline: Any, transformer_only: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Those that merge B A into the weights, and diffusers when the header is lost."""
    made, expected = trained(transformer_only, **changes)
    path = tmp_path / "lora.safetensors"
    save_lora(path, made.transformer, made.spec)
    tensors = load_file(path)
    pipeline.load_lora_weights(tensors)
    try:
        with torch.no_grad():
            theirs = predict(made.model, pipeline.transformer)
    finally:
        pipeline.unload_lora_weights()
    assert relative(theirs, expected) < 1e-5

    merged = lora_model(transformer_only).model.family.load_transformer(
        made.model, device=torch.device("cpu"), dtype=torch.float32
    )
    for name in {key.rpartition(".lora_")[0] for key in tensors}:
        weight = merged.get_submodule(name.removeprefix("transformer.")).weight
        weight += tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    with torch.no_grad():
        assert relative(predict(made.model, merged), expected) < 1e-5


def test_names_are_those_that_diffusers_writes(transformer_only: Path, tmp_path: Path) -> None:
    from diffusers import QwenImagePipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    made, _ = trained(transformer_only, lora_targets="all-linear")
    save_lora(tmp_path / "ours.safetensors", made.transformer, made.spec)
    QwenImagePipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(made.transformer),
        weight_name="theirs.safetensors",
        **_collate_lora_metadata({"transformer": made.transformer}),
    )
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    config, full = (
        json.loads(metadata_of(tmp_path / f"{name}.safetensors")["lora_adapter_metadata"])
        for name in ("ours", "theirs")
    )
    assert config.keys() <= full.keys()
    assert config["transformer.r"] == config["transformer.lora_alpha"] == made.spec.rank


def test_provenance(transformer_only: Path, tmp_path: Path) -> None:
    made, _ = trained(transformer_only, lora_alpha=2.5, use_rslora=True)
    path = tmp_path / "new" / "lora.safetensors"
    facts = {"steps": 7, "settings": {"seed": 0, "umlaut": "ä"}, "shards": [{"generation": "m"}]}
    save_lora(path, made.transformer, made.spec, provenance=facts)
    tensors, read = read_lora(path)
    assert read == {**facts, "rank": 4, "alpha": 2.5, "use_rslora": True}
    torch.testing.assert_close(tensors, load_file(path), rtol=0, atol=0)
    assert metadata_of(path).keys() == {"format", "lora_adapter_metadata", "qwen_lora"}
    assert [entry.name for entry in path.parent.iterdir()] == ["lora.safetensors"]


def test_bytes_are_reproducible(transformer_only: Path, tmp_path: Path) -> None:
    """safetensors alone orders several metadata keys at random."""
    made, _ = trained(transformer_only)
    written = set()
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        save_lora(path, made.transformer, made.spec, provenance={"b": 1, "a": [2]})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_the_canonical_header_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {f"{'x' * length}": torch.randn(length, 3) for length in range(1, 20)}
    tensors |= {"half": torch.randn(5).half(), "empty": torch.zeros(0), "flag": torch.tensor(True)}
    for length in range(9):  # every alignment
        data = canonical_header(save(tensors, {"z": "1", "a": "ü" * length, "m": '"{}\\'}))
        assert canonical_header(data) == data
        assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0
        torch.testing.assert_close(load(data), tensors, rtol=0, atol=0)
        (tmp_path / "file").write_bytes(data)
        assert metadata_of(tmp_path / "file") == {"z": "1", "a": "ü" * length, "m": '"{}\\'}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_types(transformer_only: Path, tmp_path: Path, dtype: str) -> None:
    """The scaling is folded in before the rounding."""
    made, _ = trained(transformer_only, lora_alpha=5)
    path = tmp_path / "lora.safetensors"
    save_lora(path, made.transformer, made.spec, dtype)
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, tensor in load_file(path).items():
        layer = lora_layers(made.transformer)[name.split(".", 1)[1].rpartition(".lora_")[0]]
        is_down = ".lora_A." in name
        weight = (layer.lora_A if is_down else layer.lora_B)["default"].weight.detach()
        assert torch.equal(tensor, (weight if is_down else weight * 1.25).to(stored[dtype])), name


def test_numbers_that_are_not_finite_are_not_written(
    transformer_only: Path, tmp_path: Path
) -> None:
    made, _ = trained(transformer_only)
    with torch.no_grad():
        made.parameters[1][1][0, 0] = 1e6
    path = tmp_path / "lora.safetensors"
    with pytest.raises(QwenLoraError, match=r"to_q.lora_B.weight .* float16; .* float32 may"):
        save_lora(path, made.transformer, made.spec, "float16")
    save_lora(path, made.transformer, made.spec)
    before = path.read_bytes()
    with torch.no_grad():
        made.parameters[1][1][0, 0] = float("nan")
    with pytest.raises(QwenLoraError, match="not finite in float32; nothing was written$"):
        save_lora(path, made.transformer, made.spec)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["lora.safetensors"]


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="no LoRA file at"):
        read_lora(path)
    for data in (b"", b"\xff" * 64, save({"a": torch.ones(3)})[:-1]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not a LoRA file"):
            read_lora(path)
    path.write_bytes(save({"other": torch.ones(3)}))
    assert read_lora(path)[1] == {}
