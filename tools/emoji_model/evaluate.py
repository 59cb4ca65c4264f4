"""What the finished model can do, in pictures and numbers; nothing is selected.

    python -m tools.emoji_model.evaluate MODEL NOTO LOGS OUTPUT

samples.png     32 prompts drawn by the seed, each beside the original
curves.png      losses of both trainings
evaluation.json retrieval: is the original among the 5 nearest of all emoji, by pixels?
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image

from qwen_lora.grid import Row, labelled_grid
from tools.emoji_model.images import on_white, read_images
from tools.emoji_model.state import read_log
from tools.emoji_model.text import TRIGGER
from tools.emoji_model.vae import reconstruct

SHOWN, RETRIEVED, NEAREST = 32, 200, 5
STEPS, GUIDANCE = 20, 3.0


@dataclass(frozen=True)
class Emoji:
    names: list[str]
    pixels: torch.Tensor  # [N, 3, S, S] float32 in [-1, 1]
    rgba: torch.Tensor  # [N, 4, S, S] uint8


def read_emoji(folder: Path, side: int) -> Emoji:
    """Pictures in file-name order with the names of metadata.jsonl."""
    rows = [json.loads(row) for row in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    rgba = read_images(folder, side)
    return Emoji([row["text"] for row in sorted(rows, key=_file)], on_white(rgba), rgba)


def _file(row: dict[str, Any]) -> str:
    return str(row["file_name"])


def draw(
    pipeline: Any, names: Sequence[str], side: int, seed: int, batch: int = 50
) -> torch.Tensor:
    """One picture a name with diffusers' own pipeline. [len(names), 3, side, side] in [-1, 1]."""
    pictures = []
    for start in range(0, len(names), batch):
        chunk = names[start : start + batch]
        images = pipeline(
            prompt=[f"{TRIGGER}, {name}" for name in chunk],
            negative_prompt=[" "] * len(chunk),
            true_cfg_scale=GUIDANCE,
            num_inference_steps=STEPS,
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
            output_type="np",
        ).images
        pictures.append(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(pictures)


def ranks_of_originals(pictures: torch.Tensor, rows: Sequence[int], emoji: Emoji) -> list[int]:
    """0 where the original is the nearest of all emoji by mean squared pixel difference."""
    distances = torch.cdist(pictures.flatten(1), emoji.pixels.flatten(1))  # [n, N]
    own = distances[torch.arange(len(rows)), torch.tensor(list(rows))]
    return [int(count) for count in (distances < own[:, None]).sum(dim=1)]


def evaluate(model: Path, noto: Path, logs: Path, output: Path, side: int = 64) -> None:
    """Draw with `model` as it is stored, computed in float32.

    noto: the flat emoji; logs: where the training left its vae.jsonl and transformer.jsonl.
    """
    from diffusers import QwenImagePipeline

    output.mkdir(parents=True, exist_ok=True)
    emoji = read_emoji(noto, side)
    pipeline = QwenImagePipeline.from_pretrained(str(model), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    order = torch.randperm(len(emoji.names), generator=torch.Generator().manual_seed(1)).tolist()
    rows = order[:RETRIEVED]
    pictures = draw(pipeline, [emoji.names[row] for row in rows], side, seed=0)
    ranks = ranks_of_originals(pictures, rows, emoji)
    error = reconstruct(pipeline.vae, emoji.rgba) - emoji.pixels
    result = {
        "prompts": len(rows),
        "inference_steps": STEPS,
        "guidance": GUIDANCE,
        "nearest_is_the_original": sum(rank == 0 for rank in ranks) / len(ranks),
        f"original_among_nearest_{NEAREST}": sum(rank < NEAREST for rank in ranks) / len(ranks),
        "vae_l1": round(error.abs().mean().item(), 5),
    }
    (output / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    _samples(emoji, rows[:SHOWN], pictures[:SHOWN], output / "samples.png")
    _curves(logs, output / "curves.png")


def _samples(emoji: Emoji, rows: Sequence[int], pictures: torch.Tensor, path: Path) -> None:
    """Four pairs a row: the original, what the model draws."""
    across = 4
    shown = []
    for start in range(0, len(rows), across):
        chunk = rows[start : start + across]
        images = []
        for row, picture in zip(chunk, pictures[start : start + across], strict=True):
            images += [_image(emoji.pixels[row]), _image(picture)]
        shown.append(Row(" | ".join(emoji.names[row] for row in chunk), images))
    labelled_grid(["original", "drawn"] * across, shown).save(path)


def _image(pixels: torch.Tensor) -> Image.Image:
    """[3, S, S] in [-1, 1], enlarged twice."""
    array = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    side = 2 * array.shape[0]
    return Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC)


def _curves(logs: Path, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    curves = (("vae.jsonl", "l1", "VAE: L1 of pixels"), ("transformer.jsonl", "loss", "velocity"))
    for number, (file, key, title) in enumerate(curves, start=1):
        rows = read_log(logs / file)
        axes = figure.add_subplot(1, 2, number)
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=0.8)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(evaluate)
