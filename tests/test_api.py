"""The public names, and the example that uses them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_lora

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "DataConfig",
    "InputError",
    "QwenLoraError",
    "Settings",
    "ShardError",
    "ShardSet",
    "__version__",
    "flow_matching_loss",
    "load_settings",
    "open_shards",
    "precompute",
    "sample",
    "train",
    "verify",
    "write_tiny_model",
]


def test_the_public_names_are_frozen() -> None:
    assert qwen_lora.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(qwen_lora, name) is not None
    assert set(PUBLIC) <= set(dir(qwen_lora))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        qwen_lora.nonsense  # noqa: B018


def test_the_stages_are_functions_and_packages() -> None:
    import qwen_lora.precompute.run
    import qwen_lora.train.objective
    import qwen_lora.train.run

    for name in ("precompute", "sample", "train"):
        assert callable(getattr(qwen_lora, name))
    assert qwen_lora.train.flow_matching_loss is qwen_lora.train.objective.flow_matching_loss
    assert qwen_lora.flow_matching_loss is qwen_lora.train.objective.flow_matching_loss


def test_importing_and_reading_settings_loads_no_torch() -> None:
    code = """
import sys, qwen_lora
from qwen_lora import InputError, Settings, load_settings, open_shards, precompute, sample, train
load_settings("train", None, ["rank=4"])
try:
    open_shards("no/such/folder")
except InputError:
    pass
print("torch" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.stdout == "False\n", result.stderr


def test_the_example_runs(image_folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("api_example", ROOT / "examples" / "api.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture = example.main(image_folder, tmp_path, str(tiny_model))
    assert picture == tmp_path / "picture.png" and picture.stat().st_size > 1000
    assert (tmp_path / "run" / "lora.safetensors").is_file()
