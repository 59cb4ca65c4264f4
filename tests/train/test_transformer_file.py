"""A run whose transformer comes from a single file."""

from pathlib import Path

import pytest
import torch
from random_sets import MakeSettings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_lora.errors import InputError
from qwen_lora.train.run import train

COMFY = "model.diffusion_model."


def test_a_run_trains_from_a_single_file(
    make_settings: MakeSettings, transformer_only: Path, tmp_path: Path
) -> None:
    """The same LoRA, bit for bit, as from the folder that holds the same numbers; a resume with
    another file is refused."""
    (own,) = (transformer_only / "transformer").glob("*.safetensors")
    weights = load_file(own)
    path = tmp_path / "one.safetensors"
    save_file({COMFY + name: tensor for name, tensor in weights.items()}, path)
    short = {"max_train_steps": 2, "checkpointing_steps": 1}
    folder = train(make_settings("folder", **short))
    file = train(make_settings("file", transformer_file=path, **short))
    expected, found = load_file(folder.lora), load_file(file.lora)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(file.lora, framework="pt") as lora:
        assert '"file":"one.safetensors"' in "".join(lora.metadata().values()).replace(" ", "")
        assert str(tmp_path) not in str(lora.metadata())
    save_file({COMFY + name: tensor.bfloat16() for name, tensor in weights.items()}, path)
    with pytest.raises(InputError, match="the base model's content was"):
        train(make_settings("file", transformer_file=path, **{**short, "max_train_steps": 3}))
