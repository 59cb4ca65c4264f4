"""`qwen-lora sample`, `init`, `tiny-model` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_lora.cli.stages import TransformerFile
from qwen_lora.errors import InputError

# ---- sample ----------------------------------------------------------------------------------
Prompts = Annotated[
    list[str], typer.Option("--prompt", metavar="TEXT", help="What to draw. Repeatable.")
]
Picture = Annotated[Path, typer.Option("--output", metavar="IMAGE", help="The grid, a PNG.")]
Model = Annotated[
    str, typer.Option("--model", metavar="M", help="Hugging Face id or local folder.")
]
Loras = Annotated[
    list[Path] | None,
    typer.Option("--lora", metavar="FILE", help="LoRA file; several are added up. Repeatable."),
]
LoraScale = Annotated[
    float, typer.Option("--lora-scale", metavar="X", help="Strength of the LoRA.")
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", metavar="S", min=0, help="Repeatable. [default: 0]"),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Denoising steps.")]
Guidance = Annotated[
    float, typer.Option("--true-cfg-scale", metavar="X", help="Guidance; 1 switches it off.")
]
NegativePrompt = Annotated[
    str,
    typer.Option(
        "--negative-prompt", metavar="TEXT", help="What to avoid.", show_default="one space"
    ),
]
Height = Annotated[
    int | None, typer.Option("--height", metavar="PX", min=1, help="[default: the model's]")
]
Width = Annotated[
    int | None, typer.Option("--width", metavar="PX", min=1, help="[default: the model's]")
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="float32, bfloat16, float16, auto: bfloat16 on a GPU that has it, else float32.",
    ),
]
NoBase = Annotated[bool, typer.Option("--no-base", help="Leave out the pictures without the LoRA.")]
SaveImages = Annotated[
    bool, typer.Option("--save-images", help="Save each picture beside the grid too.")
]


def sample(
    prompt: Prompts,
    output: Picture,
    model: Model = "Qwen/Qwen-Image",
    transformer: TransformerFile = None,
    lora: Loras = None,
    lora_scale: LoraScale = 1.0,
    seed: Seeds = None,
    steps: Steps = 50,
    true_cfg_scale: Guidance = 4.0,
    negative_prompt: NegativePrompt = " ",
    height: Height = None,
    width: Width = None,
    dtype: Dtype = "auto",
    no_base: NoBase = False,
    save_images: SaveImages = False,
) -> None:
    """Draw prompts with and without a LoRA, side by side in one picture.

    \b
    qwen-lora sample --lora output/lora.safetensors --prompt "a red boat" --output boat.png
    """
    from qwen_lora.sample import sample as run

    print(
        run(
            model=model,
            transformer_file=transformer,
            loras=lora or [],
            prompts=prompt,
            seeds=seed or [0],
            output=output,
            steps=steps,
            true_cfg_scale=true_cfg_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            lora_scale=lora_scale,
            dtype=dtype,
            base=not no_base,
            save_images=save_images,
        )
    )


def init(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write.", show_default=True)
    ] = Path("lora.yaml"),
) -> None:
    """Write a commented settings file with every key and its default.

    \b
    qwen-lora init lora.yaml
    """
    from qwen_lora.config.template import template

    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(template(file.name))
    except FileExistsError as error:
        raise InputError(f"{file} exists; name another file or remove it") from error
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    print(f"{file}: every setting with its default. Edit it, then:")
    print(f"  qwen-lora precompute --config {file}")
    print(f"  qwen-lora train --config {file}")


def tiny_model(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)
    ],
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", min=0, help="Of the random weights; 0.")
    ] = None,
    trained: Annotated[
        bool, typer.Option("--trained", help="The one that draws emoji of 64 pixels.")
    ] = False,
) -> None:
    """Write a tiny Qwen-Image with the real classes: random weights, or trained to draw emoji.

    \b
    qwen-lora tiny-model tiny
    qwen-lora tiny-model emoji-model --trained
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; name another")
    if trained and seed is not None:
        raise InputError("--seed is of random weights; leave it out with --trained")
    from qwen_lora.tiny_model import copy_trained_model, write_tiny_model

    if trained:
        copy_trained_model(folder)
    else:
        write_tiny_model(folder, seed=seed or 0)
    print(folder)


def demo(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder of the results.")
    ] = Path("demo"),
) -> None:
    """Run the whole job on a tiny model and bundled images, on a CPU.

    \b
    qwen-lora demo --output demo
    """
    from qwen_lora.demo import run_demo

    run_demo(output)
