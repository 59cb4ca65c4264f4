"""From a folder of captioned images to a LoRA and a picture, in Python.

python examples/api.py IMAGES OUTPUT [MODEL]

MODEL is a Hugging Face id or a folder in diffusers layout; without it a tiny model with random
weights is made, which runs on a CPU and draws textures.
"""

import sys
from pathlib import Path

import qwen_lora


def main(images: Path, output: Path, model: str | None = None) -> Path:
    """Returns where the before/after picture is."""
    if model is None:
        qwen_lora.write_tiny_model(output / "model")
        model = str(output / "model")

    # Every setting of the command line is a field; see `qwen-lora init`.
    settings = qwen_lora.Settings(
        pretrained_model_name_or_path=model,
        data_config=qwen_lora.DataConfig(img_dir=images, img_size=[64]),
        shards_dir=output / "shards",
        output_dir=output / "run",
        max_train_steps=4,
        train_batch_size=2,
        rank=4,
        learning_rate=1e-2,
    )

    # Stage 1: the VAE and the text encoder run once.
    summary = qwen_lora.precompute(settings)
    print(f"{summary.samples} samples in {settings.shards_dir}")

    # The shards can be read by anyone, without torch.
    with qwen_lora.open_shards(settings.shards_dir) as shards:
        meta = shards.read(0).meta
        print(f"{meta.source}: {meta.captions}, {meta.bucket[0]} x {meta.bucket[1]} px")

    # Stage 2: the transformer alone, from the shards.
    result = qwen_lora.train(settings)
    print(f"{result.steps} steps, {result.lora}")

    # The same seed without and with the LoRA.
    return qwen_lora.sample(
        model=model,
        loras=[result.lora],
        prompts=["a red picture"],
        seeds=[0],
        output=output / "picture.png",
        steps=2,
        height=64,
        width=64,
    )


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4]))
