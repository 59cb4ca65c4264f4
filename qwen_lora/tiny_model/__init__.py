"""Tiny but complete Qwen-Image pipelines: real classes, real file layout.

One has random weights and is made on the spot, for tests; one ships with the package and was
trained to draw emoji (docs/emoji-model.md). Every command runs on them in seconds on a CPU; nothing
outside this package and the demo knows that they are tiny.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

TRAINED = Path(str(files("qwen_lora") / "assets" / "emoji-model"))


def copy_trained_model(folder: Path) -> None:
    """Copy the trained pipeline (20 MB) into a new or empty `folder`."""
    shutil.copytree(TRAINED, folder, dirs_exist_ok=True)


def write_tiny_model(folder: Path, *, seed: int = 0) -> None:
    """Write a `QwenImagePipeline` folder of a few MB, as `save_pretrained` lays it out.

    Equal seeds give equal weight files. Raises InputError if `folder` holds something already.
    """
    from qwen_lora.tiny_model.build import write_pipeline

    write_pipeline(Path(folder), seed)
