"""What `qwen-lora demo` and `make demo` run.

Nothing here is special to the demo but the settings: every step calls what the commands call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.demo import style
from qwen_lora.grid import Row, labelled_grid
from qwen_lora.posix import write_atomic
from qwen_lora.tiny_model import TRAINED as MODEL

if TYPE_CHECKING:
    from PIL import Image

    from qwen_lora.sample import Pictures

ASSETS = Path(str(files("qwen_lora") / "assets"))
IMAGES = ASSETS / "demo-images"  # 64 emoji in 3D style, with captions: what the LoRA learns from
UNSEEN = ASSETS / "demo-unseen"  # 24 more in that style, never trained on: what it is compared with
# Names for which no picture in 3D style is here at all.
UNSEEN_FOOD = (
    "cheese wedge",
    "broccoli",
    "onion",
    "teacup without handle",
    "pie",
    "spoon",
    "melon",
    "fondue",
)
TRIGGER = "emoji"  # the model was trained on "emoji, <name>"
SIDE = 64  # pixels
SAMPLING_STEPS, GUIDANCE, SEED = 20, 2.0, 0
PREVIEWED = 6  # unseen names that are drawn while training


@dataclass(frozen=True)
class Unseen:
    """A name that the LoRA has not seen, with its picture in 3D style if there is one."""

    name: str
    original: Image.Image | None


def demo_settings(output: Path, preview_names: Sequence[str]) -> Settings:
    """A LoRA of a small model from few images, gentle enough to keep what the model draws.

    It learns at low noise levels, where surfaces are decided, and leaves the layout, which is
    decided at high ones, to the base.
    """
    return Settings(
        pretrained_model_name_or_path=str(MODEL),
        data_config=DataConfig(img_dir=IMAGES, img_size=[SIDE], trigger_word=TRIGGER, flip="both"),
        shards_dir=output / "shards",
        output_dir=output / "run",
        preview_prompts=[prompt(name) for name in preview_names],
        preview_guidance=GUIDANCE,
        preview_vae=True,
        train_batch_size=16,
        max_train_steps=150,
        learning_rate=5e-4,
        lr_scheduler="cosine",
        rank=16,
        lora_targets="all-linear",
        timestep_sampling="logit_normal",
        logit_mean=-2.2,
        logit_std=0.8,
        gradient_checkpointing=False,
        validation_fraction=0.365,  # 21 of the 64 pictures
        validation_steps=25,
        checkpointing_steps=25,
        encode_threads=2,
    )


def prompt(name: str) -> str:
    """As `trigger_word` puts it before a caption."""
    return f"{TRIGGER}, {name}"


def run(output: Path) -> None:
    """See `qwen_lora.demo.run_demo`."""
    from qwen_lora.precompute.run import precompute
    from qwen_lora.train.run import train

    unseen = read_unseen()
    settings = demo_settings(output, [item.name for item in unseen[:PREVIEWED]])
    print(f"1/3 qwen-lora precompute: 64 captioned images to {settings.shards_dir}")
    precompute(settings)
    print(f"2/3 qwen-lora train: {settings.max_train_steps} steps from the shards alone")
    result = train(settings)
    print("3/3 qwen-lora sample: names that the LoRA has not seen, without and with it")
    pictures = draw(result.lora, unseen)
    grid = output / "before-after.png"
    draw_grid(unseen, pictures).save(grid)
    numbers = measure(unseen, pictures)
    write_atomic(output / "style.json", json.dumps(numbers, indent=2).encode() + b"\n")
    print()
    print(f"LoRA          {result.lora}")
    print(f"report        {result.lora.with_name('report.html')}")
    print(f"before/after  {grid}")
    print("\n".join(summary(numbers)))


def read_unseen() -> list[Unseen]:
    """24 names with an original in 3D style, then 8 of food, without."""
    from PIL import Image

    found = []
    for file in sorted(UNSEEN.glob("*.webp")):
        with Image.open(file) as image:
            rgba = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        white = Image.new("RGB", rgba.size, "#ffffff")
        white.paste(rgba, mask=rgba.getchannel("A"))
        found.append(Unseen(file.with_suffix(".txt").read_text("utf-8").strip(), white))
    return found + [Unseen(name, None) for name in UNSEEN_FOOD]


def draw(lora: Path, unseen: Sequence[Unseen]) -> list[Pictures]:
    """Every name with the same seed, without and with the LoRA."""
    from qwen_lora.models import resolve_model
    from qwen_lora.sample import COMPONENTS, SampleRequest, load_pipeline, sample_images

    pipeline = load_pipeline(resolve_model(str(MODEL), COMPONENTS), [lora], dtype="float32")
    request = SampleRequest(
        prompts=[prompt(item.name) for item in unseen],
        seeds=[SEED],
        steps=SAMPLING_STEPS,
        true_cfg_scale=GUIDANCE,
        height=SIDE,
        width=SIDE,
    )
    return sample_images(pipeline, request)


def measure(unseen: Sequence[Unseen], pictures: Sequence[Pictures]) -> dict[str, float]:
    """The style and content of what was drawn, base against LoRA; see `qwen_lora.demo.style`.

    Blurring too makes flat pictures gentle and nearer to anything: the blurred base shows how far
    that alone goes.
    """
    from PIL import Image, ImageFilter

    blur = ImageFilter.GaussianBlur(2)  # about as much shading as the LoRA gives
    base = [np.asarray(item.base) for item in pictures]
    lora = [np.asarray(item.lora) for item in pictures]
    known = [index for index, item in enumerate(unseen) if item.original is not None]
    food = [index for index, item in enumerate(unseen) if item.original is None]
    originals = [np.asarray(unseen[index].original) for index in known]
    blurred = [np.asarray(Image.fromarray(base[i]).filter(blur)) for i in known]
    base_known, lora_known = [base[i] for i in known], [lora[i] for i in known]
    numbers = {
        "shading_base": style.mean_shading(base_known),
        "shading_lora": style.mean_shading(lora_known),
        "shading_originals": style.mean_shading(originals),
        "distance_base": style.distance(base_known, originals),
        "distance_lora": style.distance(lora_known, originals),
        "distance_blurred_base": style.distance(blurred, originals),
        "shading_food_base": style.mean_shading([base[i] for i in food]),
        "shading_food_lora": style.mean_shading([lora[i] for i in food]),
        "same_content": style.same_content(lora, base),
    }
    return {key: round(value, 4) for key, value in numbers.items()}


def summary(numbers: dict[str, float]) -> list[str]:
    """What the numbers say, for names that the LoRA has not seen."""

    def change(what: str) -> str:
        return f"{numbers[f'{what}_base']:.3f} base -> {numbers[f'{what}_lora']:.3f} LoRA"

    return [
        f"shading       {change('shading')}; 3D originals {numbers['shading_originals']:.3f}",
        f"distance      {change('distance')}, of pixels to the 3D originals "
        f"({numbers['distance_blurred_base']:.3f} for the base merely blurred)",
        f"food          {change('shading_food')} shading; no 3D original of food is here",
        f"content       {numbers['same_content']:.0%} of the pictures with the LoRA are nearest to "
        "their own name's picture without it",
    ]


def draw_grid(unseen: Sequence[Unseen], pictures: Sequence[Pictures]) -> Image.Image:
    """Four names a row: base, LoRA and the 3D original, which food does not have."""
    from PIL import Image

    across, blank = 4, Image.new("RGB", (SIDE, SIDE), "#ffffff")
    rows = []
    for start in range(0, len(unseen), across):
        chunk = list(zip(unseen, pictures, strict=True))[start : start + across]
        images: list[Image.Image] = []
        for item, picture in chunk:
            for image in (picture.base, picture.lora, item.original):
                shown = blank if image is None else image
                images.append(shown.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC))
        rows.append(Row(" | ".join(item.name for item, _ in chunk), images))
    return labelled_grid(["base", "with LoRA", "3D original"] * across, rows)
