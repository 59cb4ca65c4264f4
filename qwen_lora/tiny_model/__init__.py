"""A tiny but complete Qwen-Image pipeline with random weights: real classes, real file layout.

Every command runs on it in seconds on a CPU; nothing outside this package knows that it is tiny.
"""

from __future__ import annotations

from pathlib import Path


def write_tiny_model(folder: Path, *, seed: int = 0) -> None:
    """Write a `QwenImagePipeline` folder of a few MB, as `save_pretrained` lays it out.

    Equal seeds give equal weight files. Raises InputError if `folder` holds something already.
    """
    from qwen_lora.tiny_model.build import write_pipeline

    write_pipeline(Path(folder), seed)
