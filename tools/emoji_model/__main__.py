"""python -m tools.emoji_model NOTO FLUENT OUTPUT: train the tiny Qwen-Image that draws emoji."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from qwen_lora.errors import QwenLoraError
from qwen_lora.precompute.run import precompute
from tools.emoji_model.assemble import shard_settings, write_pipeline
from tools.emoji_model.images import read_images
from tools.emoji_model.text import build_text_encoder, build_tokenizer
from tools.emoji_model.transformer import CONFIG, TransformerRecipe, read_cache, train_transformer
from tools.emoji_model.vae import VaeRecipe, measure_latents, train_vae

SIDE = 64  # pixels; what the flat emoji are


def main(
    emoji: Annotated[Path, typer.Argument(help="flat emoji, captions in metadata.jsonl")],
    more: Annotated[Path, typer.Argument(help="more pictures, for the VAE alone")],
    output: Annotated[Path, typer.Argument(help="everything is kept here; a rerun continues")],
    vae_steps: int = VaeRecipe.steps,
    transformer_steps: int = TransformerRecipe.steps,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """A VAE, a tokenizer with a random text encoder, a shard set, a transformer: OUTPUT/model."""
    torch.set_num_threads(threads)
    vae = _vae(emoji, more, output, VaeRecipe(steps=vae_steps, seed=seed))
    rows = (emoji / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = build_tokenizer(json.loads(row)["text"] for row in rows)
    parts: dict[str, Any] = {
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": build_text_encoder(tokenizer, seed),
    }
    encoders, shards = output / "encoders", output / "shards"
    if not (encoders / "model_index.json").exists():
        write_pipeline(encoders, **parts, transformer=QwenImageTransformer2DModel(**CONFIG))
    precompute(shard_settings(encoders, emoji, shards, SIDE))
    recipe = TransformerRecipe(steps=transformer_steps, seed=seed)
    transformer = train_transformer(output, read_cache(shards), recipe)
    write_pipeline(output / "model", **parts, transformer=transformer)
    print(f"wrote {output / 'model'}")


def _vae(emoji: Path, more: Path, output: Path, recipe: VaeRecipe) -> Any:
    """The finished VAE with measured latent statistics; trained or continued if it is not there."""
    finished = output / "vae"
    if not (finished / "config.json").exists():
        images = read_images(emoji, SIDE)
        vae = train_vae(output, torch.cat([images, read_images(more, SIDE)]), recipe)
        measure_latents(vae, images)
        vae.save_pretrained(str(finished))
    return AutoencoderKLQwenImage.from_pretrained(str(finished)).eval()


if __name__ == "__main__":
    try:
        typer.run(main)
    except QwenLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
