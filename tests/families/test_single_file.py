"""A transformer from one safetensors file: the forms that people share, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_lora.errors import InputError
from qwen_lora.families.qwen_image.scaled import ScaledLinear, quantize_rows
from qwen_lora.families.qwen_image.transformer import make_modulation_table
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.train.base_model import base_fingerprint
from qwen_lora.weight_hashes import weight_hashes

CPU = torch.device("cpu")
COMFY = "model.diffusion_model."
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> Tensors:
    (path,) = (tiny_model / "transformer").glob("*.safetensors")
    return load_file(path)


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("transformer_blocks.")


def as_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def per_tensor(tensor: torch.Tensor, limit: float, dtype: torch.dtype) -> tuple[Any, Any]:
    scale = tensor.abs().max() / limit
    scaled = tensor / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def plain_fp8(weights: Tensors) -> tuple[Tensors, Tensors]:
    """Everything, biases and norms too."""
    file = {COMFY + name: tensor.to(FP8) for name, tensor in weights.items()}
    return file, {name: tensor.to(FP8).float() for name, tensor in weights.items()}


def fp8_scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's older form."""
    file, expected = {COMFY + "scaled_fp8": torch.zeros(2, dtype=FP8)}, {}
    for name, tensor in weights.items():
        expected[name] = tensor.bfloat16().float()
        file[COMFY + name] = tensor.bfloat16()
        if is_quantised(name, tensor):
            layer = COMFY + name.removesuffix(".weight")
            file[COMFY + name], scale = per_tensor(tensor, 448, FP8)
            file[f"{layer}.scale_weight"] = scale.float()
            file[f"{layer}.scale_input"] = torch.tensor(1.0)
            expected[name] = file[COMFY + name].float() * scale
    return file, expected


def comfy_quant(weights: Tensors) -> tuple[Tensors, Tensors]:
    """The newer form: fp8, with a text encoder in the same file, which is not the transformer's."""
    file, expected = fp8_scaled(weights)
    del file[COMFY + "scaled_fp8"]
    for key in [key for key in file if key.endswith("scale_weight")]:
        layer = key.removesuffix(".scale_weight")
        file[f"{layer}.weight_scale"] = file.pop(key)
        file[f"{layer}.input_scale"] = file.pop(f"{layer}.scale_input")
        about = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        file[f"{layer}.comfy_quant"] = as_bytes(about)
    file["text_encoders.qwen25_7b.model.norm.weight"] = torch.ones(3)
    return file, expected


def int8_rows(weights: Tensors) -> tuple[Tensors, Tensors]:
    """int8 with a scale for each row, diffusers' names."""
    file, expected = dict(weights), dict(weights)
    for name, tensor in weights.items():
        if is_quantised(name, tensor):
            file[name], scale = quantize_rows(tensor, torch.int8)
            layer = name.removesuffix(".weight")
            file[f"{layer}.weight_scale"] = scale[:, None]
            file[f"{layer}.comfy_quant"] = as_bytes({"format": "int8_tensorwise"})
            expected[name] = file[name].float() * scale[:, None]
    return file, expected


def e5m2(weights: Tensors) -> tuple[Tensors, Tensors]:
    file = {name: tensor.to(torch.float8_e5m2) for name, tensor in weights.items()}
    return file, {name: tensor.float() for name, tensor in file.items()}


def same(weights: Tensors) -> tuple[Tensors, Tensors]:
    return dict(weights), dict(weights)


FORMS = (same, plain_fp8, e5m2, fp8_scaled, comfy_quant, int8_rows)


def opened(folder: Path, file: Tensors, path: Path, **metadata: str) -> ModelFolder:
    save_file(file, path, metadata=metadata or None)
    return resolve_model(str(folder), ("transformer", "scheduler"), transformer_file=path)


def load(model: ModelFolder, precision: str = "bf16", dtype: Any = torch.float32) -> Any:
    return model.family.load_transformer(model, device=CPU, dtype=dtype, base_precision=precision)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_each_form_loads_as_its_numbers(
    form: Callable[..., Any], weights: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    """In float32 to the last digit but rounding of the scale's product; in bf16 within its step."""
    file, expected = form(weights)
    model = opened(tiny_model, file, tmp_path / "one.safetensors")
    found = load(model).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-6, atol=0), name
    half = load(model, dtype=torch.bfloat16).state_dict()
    for name, tensor in expected.items():
        assert half[name].dtype == torch.bfloat16
        assert torch.allclose(half[name].float(), tensor, rtol=2**-8, atol=0), name


@pytest.mark.parametrize(
    ("form", "precision"),
    [(plain_fp8, "fp8"), (fp8_scaled, "fp8"), (comfy_quant, "fp8"), (int8_rows, "int8")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_8_bits_stay_as_they_are(
    form: Callable[..., Any], precision: str, weights: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    """With a base of the file's own type nothing is rounded a second time."""
    file, expected = form(weights)
    loaded = load(opened(tiny_model, file, tmp_path / "one.safetensors"), precision)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, ScaledLinear)}
    assert len(layers) == 22
    for name, layer in layers.items():
        key = f"{name}.weight" if precision == "int8" else f"{COMFY}{name}.weight"
        assert torch.equal(layer.weight.view(torch.uint8), file[key].view(torch.uint8)), name
        held = layer.weight.float() * layer.scale[:, None]
        assert torch.allclose(held, expected[f"{name}.weight"], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("form", [same, plain_fp8, e5m2], ids=lambda form: form.__name__)
def test_diffusers_reads_the_same(
    form: Callable[..., Any], weights: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    """Its `from_single_file` knows names without a prefix and files without scales."""
    from diffusers import QwenImageTransformer2DModel

    file = {key.removeprefix(COMFY): tensor for key, tensor in form(weights)[0].items()}
    model = opened(tiny_model, file, tmp_path / "one.safetensors")
    theirs = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"),
        config=str(tiny_model),
        subfolder="transformer",
        torch_dtype=torch.float32,
        local_files_only=True,
    ).state_dict()
    ours = load(model).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_description_may_be_in_the_metadata(
    weights: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    """Layers named with the prefix or without."""
    file, expected = comfy_quant(weights)
    names = [key for key in file if key.endswith(".comfy_quant")]
    layers: dict[str, Any] = {}
    for number, key in enumerate(names):
        layer = key.removesuffix(".comfy_quant")
        layers[layer if number % 2 else layer.removeprefix(COMFY)] = {"format": "float8_e4m3fn"}
        del file[key]
    about = json.dumps({"format_version": "1.0", "layers": layers})
    model = opened(tiny_model, file, tmp_path / "one.safetensors", _quantization_metadata=about)
    found = load(model).state_dict()
    assert all(torch.allclose(found[n], t, rtol=1e-6, atol=0) for n, t in expected.items())
    broken = opened(tiny_model, file, tmp_path / "two.safetensors", _quantization_metadata="{")
    with pytest.raises(InputError, match="description of quantised layers cannot be read"):
        load(broken)


LAYER = "transformer_blocks.0.attn.to_q"


def wrong(change: str, weights: Tensors) -> Tensors:
    file, _ = comfy_quant(weights)
    layer = COMFY + LAYER
    outs, ins = weights[f"{LAYER}.weight"].shape
    if change == "no scale":
        del file[f"{layer}.weight_scale"]
    elif change == "no scale, older":
        file, _ = fp8_scaled(weights)
        del file[f"{layer}.scale_weight"]
    elif change == "blocks":
        file[f"{layer}.weight_scale"] = torch.ones(outs, ins // 32)
    elif change == "another format":
        file[f"{layer}.comfy_quant"] = as_bytes({"format": "mxfp8"})
    elif change == "rotated":
        file, _ = int8_rows(weights)
        about = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}
        file[f"{LAYER}.comfy_quant"] = as_bytes(about)
    elif change == "packed":
        file[f"{layer}.weight"] = torch.zeros(outs, ins // 2, dtype=torch.uint8)
        file[f"{layer}.comfy_quant"] = as_bytes({"format": "nvfp4"})
    elif change == "int8 alone":
        file = dict(weights)
        file[f"{LAYER}.weight"] = torch.zeros(outs, ins, dtype=torch.int8)
    elif change == "a scale too many":
        file[f"{layer}.weight"] = weights[f"{LAYER}.weight"]
        del file[f"{layer}.comfy_quant"]
    elif change == "no weight":
        del file[f"{layer}.weight"]
    elif change == "another scale":
        file[f"{layer}.pre_quant_scale"] = torch.ones(ins)
    elif change == "no json":
        file[f"{layer}.comfy_quant"] = torch.zeros(3, dtype=torch.uint8)
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no scale", "is F8_E4M3 and has no scale"),
        ("no scale, older", "is F8_E4M3 and has no scale"),
        ("blocks", "has a scale of shape"),
        ("another format", "quantised as mxfp8, which is not understood"),
        ("rotated", "with convrot, convrot_groupsize, which is not understood"),
        ("packed", r"is U8 \(nvfp4\), which is not understood"),
        ("int8 alone", "is int8, and the file does not say how"),
        ("a scale too many", "is F32 and yet has a scale"),
        ("no weight", "which has no weight in it"),
        ("another scale", "pre_quant_scale' that its config has no place for"),
        ("no json", "cannot be read"),
    ],
)
def test_what_is_not_understood_is_refused(
    change: str, said: str, weights: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    """In one line that names the file and the layer, not with wrong weights."""
    path = tmp_path / "one.safetensors"
    model = opened(tiny_model, wrong(change, weights), path)
    with pytest.raises(InputError, match=said) as caught:
        load(model)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert change == "no json" or LAYER in str(caught.value)


def test_files_that_cannot_be_one(tiny_model: Path, tmp_path: Path) -> None:
    def resolve(path: Path) -> ModelFolder:
        return resolve_model(str(tiny_model), ("transformer",), transformer_file=path)

    with pytest.raises(InputError, match="does not exist"):
        resolve(tmp_path / "none.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"is no \.safetensors file; GGUF"):
        resolve(tmp_path / "model.gguf")
    (tmp_path / "cut.safetensors").write_bytes(bytes(20))
    with pytest.raises(InputError, match="is damaged"):
        load(resolve(tmp_path / "cut.safetensors"))
    with pytest.raises(InputError, match="holds no weight of a transformer"):
        load(opened(tiny_model, {"scaled_fp8": torch.zeros(2)}, tmp_path / "empty.safetensors"))
    with pytest.raises(InputError, match="has no place for|lacks"):
        load(opened(tiny_model, {"vae.weight": torch.zeros(2)}, tmp_path / "vae.safetensors"))


def test_the_folders_weights_may_be_absent(
    weights: Tensors, tiny_model: Path, tmp_path: Path
) -> None:
    """Config and nothing else; the table is made from the file, and the base is named by it."""
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    shutil.copy(tiny_model / "transformer" / "config.json", folder / "transformer")
    with pytest.raises(InputError, match="has no weights"):
        resolve_model(str(folder), ("transformer",))
    path = tmp_path / "one.safetensors"
    save_file(fp8_scaled(weights)[0], path)
    model = resolve_model(str(folder), ("transformer",), transformer_file=path)
    table = tmp_path / "table.safetensors"
    table.touch()
    make_modulation_table(model, table, device=CPU, dtype=torch.bfloat16)
    with safe_open(str(table), framework="pt") as made:
        assert made.get_slice("rows").get_shape()[1] == 2
    assert weight_hashes(model.weights("transformer")).keys() == {path.name}
    named = base_fingerprint(model)
    save_file(plain_fp8(weights)[0], path)
    assert base_fingerprint(model) != named
    whole = resolve_model(str(tiny_model), ("transformer",))
    same_file = next((tiny_model / "transformer").glob("*.safetensors"))
    assert base_fingerprint(
        dataclasses.replace(whole, transformer_file=same_file), tmp_path / "cache.json"
    ) == base_fingerprint(whole, tmp_path / "cache.json")
