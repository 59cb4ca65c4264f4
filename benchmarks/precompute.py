"""Stage 1: what encodes images and captions, beside the caching loop of diffusers' example.

python benchmarks/precompute.py [--px N] [--images N] [--captions N] [--repeats N] [--device cuda]

Both sides decode the same JPEGs to the same square and encode them with the same random weights in
batches of the same size, in one process with one thread. The example's side is that of
`train_dreambooth_lora_qwen_image.py`: Pillow, bilinear, `AutoencoderKLQwenImage`, and captions
through `QwenImagePipeline.encode_prompt`. The VAE has Qwen-Image's width, the text model is small.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, print_table, take_turns
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from PIL import Image, ImageOps

from qwen_lora.config.schema import DataConfig
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.precompute.ahead import work_ahead
from qwen_lora.precompute.geometry import make_geometries
from qwen_lora.precompute.images import decode_image
from qwen_lora.precompute.inspect import inspect_image
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection
from qwen_lora.shards.format import Geometry
from qwen_lora.tiny_model.build import make_pipeline, make_text_encoder

SIZES = {"2 MP": (1224, 1632), "12 MP": (3024, 4032)}  # height, width
FEWEST_TOKENS, MOST_TOKENS = 5, 400
Way = Callable[[], object]


def write_jpeg(path: Path, size: tuple[int, int], seed: int) -> None:
    """Soft shapes under grain: about the bytes a pixel of a photograph at quality 92."""
    draws = np.random.default_rng(seed)
    shapes = Image.fromarray(draws.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize(size[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += draws.integers(-6, 7, (*size, 3), dtype=np.int16)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def write_model(folder: Path, base_dim: int, text_width: int) -> ModelFolder:
    parts = make_pipeline(0)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=base_dim).eval()
    text_encoder = make_text_encoder(parts.tokenizer, text_width, spread=0.02)
    parts.register_modules(vae=vae, text_encoder=text_encoder)
    parts.save_pretrained(str(folder))
    return resolve_model(str(folder), ["vae", "text_encoder", "tokenizer"])


def planned(path: Path, data: DataConfig, px: int) -> tuple[Inspection, Geometry]:
    inspection = inspect_image(Candidate(ImageSource(path.name, path), ("x",)), data)
    assert isinstance(inspection, Inspection)
    geometries = make_geometries(inspection, data, px, 16, 0)
    assert isinstance(geometries, tuple)
    return inspection, geometries[0]


def pillow_decode(path: Path, px: int) -> np.ndarray:
    """As the example's dataset does: shorter side to `px`, bilinear, the middle square."""
    image = ImageOps.exif_transpose(Image.open(path))
    image = image.convert("RGB")
    scale = px / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - px) // 2, (size[1] - px) // 2
    return np.asarray(image.crop((left, top, left + px, top + px)))


def to_batch(images: list[np.ndarray], device: torch.device) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1  # [B, 3, px, px]


def batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def image_ways(
    model: ModelFolder, pipeline: Any, paths: list[Path], px: int, device: torch.device
) -> dict[str, Way]:
    data = DataConfig(square=True)
    plans = [planned(path, data, px) for path in paths]
    encoder = model.family.load_latent_encoder(model, device=device, dtype=torch.float32)
    vae = pipeline.vae

    def ours() -> None:
        for group in batches(plans, 4):
            pixels = to_batch([decode_image(*plan, data) for plan in group], device)
            encoder.encode(pixels)

    def theirs() -> None:
        for group in batches(paths, 4):
            pixels = to_batch([pillow_decode(path, px) for path in group], device)
            vae.encode(pixels[:, :, None]).latent_dist.mode().cpu()

    return {"example": theirs, "this project": ours}


def make_captions(count: int, tokenizer: Any) -> list[str]:
    """Most are short and a few long: lengths drawn evenly in the logarithm."""
    draws = random.Random(0)
    captions = []
    for _ in range(count):
        length = round(FEWEST_TOKENS * (MOST_TOKENS / FEWEST_TOKENS) ** draws.random())
        text = ""
        while tokenizer.count([text])[0].tokens < length:
            text += draws.choice([" red", " owl", " tree", " blue", " on", " a"])
        captions.append(text.strip())
    return captions


def padding_share(lengths: list[int], size: int) -> float:
    """Of all tokens in padded batches of `size` in this order."""
    padded = sum(max(group) * len(group) for group in batches(lengths, size))
    return 1 - sum(lengths) / padded


def caption_ways(
    model: ModelFolder, pipeline: Any, captions: list[str], device: torch.device
) -> dict[str, Way]:
    def loaded(cache: bool) -> Any:
        return model.family.load_prompt_encoder(
            model, device=device, dtype=torch.float32, prefix_cache=cache
        )

    def ours(encoder: Any) -> Way:
        return lambda: [encoder.encode(group) for group in batches(captions, 16)]

    def theirs() -> None:
        for group in batches(captions, 16):
            pipeline.encode_prompt(group)[0].cpu()

    return {
        "example": theirs,
        "this project, no prefix cache": ours(loaded(False)),
        "this project": ours(loaded(True)),
    }


def decode_ways(paths: dict[str, Path], targets: list[int]) -> dict[str, Way]:
    ways: dict[str, Way] = {}
    for name, path in paths.items():
        for px in targets:
            label = f"{name} to {px} px"
            ways[f"{label}, example (Pillow, bilinear)"] = lambda path=path, px=px: pillow_decode(
                path, px
            )
            for kind, scaled in (("", False), (", scaled decode", True)):
                data = DataConfig(square=True, jpeg_scaled_decode=scaled)
                plan = planned(path, data, px)
                ways[f"{label}, this project{kind}"] = lambda plan=plan, data=data: decode_image(
                    *plan, data
                )
    return ways


def waiting_share(path: Path, px: int, images: int) -> tuple[float, float]:
    """Share of its time that an encoder waits for pixels, and the decoding of one image in s.

    The encoder is a stand-in that only takes time, as a GPU does: 1.25 times what decoding takes
    with all cores. The first image, for which there is nothing to overlap with, is left out.
    """
    data = DataConfig(square=True)
    plan = planned(path, data, px)

    def decoded(busy: float) -> tuple[float, float]:
        """Seconds waited after the first image, and of everything."""
        waited, begin = 0.0, time.perf_counter()
        asked = begin
        work = work_ahead(range(images), lambda _: decode_image(*plan, data), workers=4, ahead=12)
        for number, _ in work:
            waited += time.perf_counter() - asked if number else 0
            time.sleep(busy)
            asked = time.perf_counter()
        return waited, asked - begin

    each = decoded(0)[1] / images
    waited, wall = decoded(1.25 * each)
    return waited / wall, each


def print_rates(
    title: str, ways: dict[str, Way], units: int, repeats: int, on_cpu: bool = True
) -> None:
    """Medians, a second of the core that does it, or on the clock with a GPU; each beside the last
    way of the example before it."""
    taken = take_turns(ways, repeats)
    rows, base = [], 0.0
    for name, times in taken.items():
        seconds = [(one.cpu if on_cpu else one.wall) / units for one in times]
        rate = 1 / statistics.median(seconds)
        if "example" in name:
            base = rate
        least, most = 1 / max(seconds), 1 / min(seconds)
        rows.append([name, f"{rate:.2f}", f"{least:.2f}-{most:.2f}", f"{rate / base:.2f}"])
    print_table(title, ["", "a second", "min-max", "vs example"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--targets", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--base-dim", type=int, default=96)
    parser.add_argument("--text-width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, repeats = torch.device(options.device), options.repeats
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        paths = [folder / f"{number}.jpg" for number in range(options.images)]
        for number, path in enumerate(paths):
            write_jpeg(path, SIZES["2 MP"], number)
        large = folder / "large.jpg"
        write_jpeg(large, SIZES["12 MP"], 0)
        model = write_model(folder / "model", options.base_dim, options.text_width)
        pipeline = QwenImagePipeline.from_pretrained(str(model.path), dtype=torch.float32)
        pipeline.vae.to(device)
        pipeline.text_encoder.to(device)
        where = f"float32, {device}, one thread, {repeats} repeats in turn"
        print_rates(
            f"2 MP JPEGs to latents of {options.px} px, {where}, images",
            image_ways(model, pipeline, paths, options.px, device),
            len(paths),
            repeats,
            device.type == "cpu",
        )
        tokenizer = model.family.load_tokenizer(model)
        captions = make_captions(options.captions, tokenizer)
        lengths = [count.tokens for count in tokenizer.count(captions)]
        print_rates(
            f"captions of {min(lengths)} to {max(lengths)} tokens, {where}, captions",
            caption_ways(model, pipeline, captions, device),
            len(captions),
            repeats,
            device.type == "cpu",
        )
        print(
            f"padding in the example's batches of 16: {padding_share(lengths, 16):.1%} of tokens; "
            f"sorted by length: {padding_share(sorted(lengths), 16):.1%}; this project's: none"
        )
        print_rates(
            f"decoding and resizing on one core, {repeats} repeats in turn, images",
            decode_ways({"2 MP": paths[0], "12 MP": large}, options.targets),
            1,
            repeats,
        )
        share, each = waiting_share(paths[0], options.targets[-1], 10 * options.images)
        print(
            f"4 decode workers give an image in {1000 * each:.0f} ms; an encoder that takes 1.25 "
            f"times that waits {share:.1%} of its time"
        )


if __name__ == "__main__":
    main()
