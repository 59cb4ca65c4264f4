"""The whole job on the embedded model and images, in minutes on a CPU."""

from __future__ import annotations

from pathlib import Path


def run_demo(output: Path) -> None:
    """Shards, a LoRA, its report and a before/after picture under `output`; a rerun continues."""
    from qwen_lora.demo.run import run

    run(Path(output))
