"""The whole job on the embedded model and images: what `qwen-lora demo` and `make demo` run.

Nothing here is special to the demo but the settings: every line calls what the commands call.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from qwen_lora.config.schema import DataConfig, Settings

PROMPTS = ["owl", "party popper", "bicycle"]
IMAGE_SIDE = 128


def demo_settings(images: Path, output: Path) -> Settings:
    """What the demo runs with; a learning rate for a model of a few million random weights."""
    return Settings(
        pretrained_model_name_or_path=str(output / "model"),
        data_config=DataConfig(img_dir=images, img_size=[IMAGE_SIDE]),
        shards_dir=output / "shards",
        output_dir=output / "run",
        train_batch_size=8,
        max_train_steps=200,
        learning_rate=3e-3,
        lora_targets="all-linear",
        gradient_checkpointing=False,
        validation_fraction=0.4,
        validation_steps=50,
        checkpointing_steps=100,
        encode_threads=2,
    )


def run_demo(output: Path) -> None:
    """Tiny model, shards, LoRA and a before/after picture under `output`; a rerun continues."""
    from qwen_lora.precompute.run import precompute
    from qwen_lora.sample import sample
    from qwen_lora.tiny_model import write_tiny_model
    from qwen_lora.train.run import train

    model = output / "model"
    if not (model / "model_index.json").exists():
        print(f"1/4 writing a tiny Qwen-Image with random weights to {model}")
        write_tiny_model(model)
    with as_file(files("qwen_lora") / "assets" / "demo-images") as images:
        settings = demo_settings(images, output)
        print(f"2/4 qwen-lora precompute: 64 captioned images to {settings.shards_dir}")
        precompute(settings)
    print(f"3/4 qwen-lora train: {settings.max_train_steps} steps from the shards alone")
    result = train(settings)
    print("4/4 qwen-lora sample: the same seeds without and with the LoRA")
    picture = sample(
        model=str(model),
        loras=[result.lora],
        prompts=PROMPTS,
        seeds=[0],
        output=output / "before-after.png",
        steps=20,
        height=IMAGE_SIDE,
        width=IMAGE_SIDE,
    )
    print()
    print(f"LoRA          {result.lora}")
    print(f"loss curve    {result.lora.with_name('loss.png')}")
    print(f"before/after  {picture}")
    print("The model's weights are random, so it draws textures: what counts is that the loss on")
    print("held-out images fell and that the picture changed. A real Qwen-Image runs the same way.")
