"""Sampling with diffusers' own pipeline, with and without a LoRA, into one labelled picture."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.grid import Row, labelled_grid
from qwen_lora.progress import Progress

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from qwen_lora.models import ModelFolder

COMPONENTS = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
MAX_PROMPT_TOKENS = 1024  # the pipeline's upper limit, and what precompute keeps of a caption
MIN_STEPS = 2  # with one step the scheduler's terminal shift divides by zero
ACTIVATIONS = 4 << 30  # bytes left free on the card beside the weights
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class SampleRequest:
    """What to draw. height and width are pixels; None is the model's own size."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = " "
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Pictures:
    """What one prompt and seed gave."""

    prompt: str
    seed: int
    base: Image.Image | None
    lora: Image.Image | None


def sample(
    model: str,
    loras: Sequence[Path],
    prompts: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    *,
    steps: int = 50,
    true_cfg_scale: float = 4.0,
    negative_prompt: str = " ",
    height: int | None = None,
    width: int | None = None,
    lora_scale: float = 1.0,
    dtype: str = "auto",
    base: bool = True,
    save_images: bool = False,
    transformer_file: Path | None = None,
) -> Path:
    """Draw every prompt with every seed, without and with the LoRAs, and write one labelled grid.

    model: hub id or folder with all five components. loras: LoRA files or run folders, added up.
    output: the grid; its suffix decides the format. base: also draw without the LoRAs.
    save_images: each picture too, beside the grid. transformer_file: a single safetensors file that
    stands for the model's own transformer weights. Noise is drawn on the CPU, so a seed means the
    same on every machine. Returns `output`.

    Raises InputError for files and sizes that cannot work, QwenLoraError when memory runs out.
    """
    request = SampleRequest(prompts, seeds, steps, true_cfg_scale, negative_prompt, height, width)
    files = [_lora_file(path) for path in loras]
    _check_request(request, output)
    if not base and not files:
        raise InputError("nothing to draw: no --lora is given and --no-base leaves out the base")

    from qwen_lora.models import resolve_model

    folder = resolve_model(model, COMPONENTS, transformer_file=transformer_file)
    _check_size(request, folder.family.image_multiple)
    with _memory_errors():
        pipeline = load_pipeline(folder, files, lora_scale, dtype)
        pictures = sample_images(pipeline, request, base=base, lora=bool(files))
    _save(_grid(pictures, files), output)
    if save_images:
        for number, picture in enumerate(pictures):
            for kind, image in (("base", picture.base), ("lora", picture.lora)):
                if image is not None:
                    name = f"{output.stem}-{number:03d}-seed{picture.seed}-{kind}{output.suffix}"
                    _save(image, output.with_name(name))
    return output


def sample_images(
    pipeline: Any, request: SampleRequest, *, base: bool = True, lora: bool = True
) -> list[Pictures]:
    """Draw with a loaded diffusers pipeline, prompts outermost. The same seed gives the same noise
    with and without the LoRA. Prompts are encoded once, before the first picture."""
    import torch

    kinds = [on for on, wanted in ((False, base), (True, lora)) if wanted]
    jobs = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    guided = request.true_cfg_scale > 1
    with torch.no_grad():
        conditions = {text: _encode(pipeline, text) for text in dict.fromkeys(request.prompts)}
        negative = _encode(pipeline, request.negative_prompt) if guided else None
        images: dict[bool, list[Any]] = {}
        with Progress("sample", len(kinds) * len(jobs) * request.steps, "steps") as progress:
            for on in kinds:
                if lora:
                    pipeline.enable_lora() if on else pipeline.disable_lora()
                images[on] = [
                    _draw(pipeline, request, conditions[prompt], negative, seed, progress)
                    for prompt, seed in jobs
                ]
    nothing = [None] * len(jobs)
    drawn = zip(jobs, images.get(False, nothing), images.get(True, nothing), strict=True)
    return [Pictures(prompt, seed, plain, adapted) for (prompt, seed), plain, adapted in drawn]


Condition = tuple["torch.Tensor", "torch.Tensor"]  # [1, T, D], [1, T]


def _encode(pipeline: Any, text: str) -> Condition:
    import torch

    embeds, mask = pipeline.encode_prompt(
        prompt=[text],
        device=pipeline._execution_device,
        max_sequence_length=MAX_PROMPT_TOKENS,
    )
    if mask is None:  # the pipeline's word for "every token counts"
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return embeds, mask


def _draw(
    pipeline: Any,
    request: SampleRequest,
    condition: Condition,
    negative: Condition | None,
    seed: int,
    progress: Progress,
) -> Any:
    import torch

    def count(_pipeline: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        progress.update()
        return values

    result = pipeline(
        prompt_embeds=condition[0],
        prompt_embeds_mask=condition[1],
        negative_prompt_embeds=None if negative is None else negative[0],
        negative_prompt_embeds_mask=None if negative is None else negative[1],
        true_cfg_scale=request.true_cfg_scale,
        num_inference_steps=request.steps,
        height=request.height,
        width=request.width,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=MAX_PROMPT_TOKENS,
        callback_on_step_end=count,
    )
    return result.images[0]


# ---- loading ---------------------------------------------------------------------------------


def load_pipeline(
    folder: ModelFolder, loras: Sequence[Path] = (), lora_scale: float = 1.0, dtype: str = "auto"
) -> Any:
    """diffusers' pipeline with the LoRAs added, on the GPU when there is one.

    What does not fit the card stays in host memory: whole components, or single layers when not
    even the largest component fits. Raises InputError when a LoRA does not belong to the model.
    """
    import torch

    type_ = _dtype(dtype)
    given = {}
    if folder.transformer_file is not None:
        cpu = torch.device("cpu")
        given["transformer"] = folder.family.load_transformer(folder, device=cpu, dtype=type_)
    with _bars_only_on_a_terminal():
        pipeline = folder.family.pipeline().from_pretrained(
            str(folder.path), dtype=type_, local_files_only=True, use_safetensors=True, **given
        )
    pipeline.set_progress_bar_config(disable=True)
    names = [f"lora{number}" for number in range(len(loras))]
    for name, file in zip(names, loras, strict=True):
        _add_lora(pipeline, file, name)
    if names:
        pipeline.set_adapters(names, [lora_scale] * len(names))
    if torch.cuda.is_available():
        _place(pipeline)
    return pipeline


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """The libraries' loading bars fill a log file with control characters."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled() and not sys.stderr.isatty()
    ]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _dtype(name: str) -> torch.dtype:
    import torch

    if name == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if gpu else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _add_lora(pipeline: Any, file: Path, name: str) -> None:
    """Load one file as an adapter. diffusers only warns when nothing in it fits: that is an error
    here."""
    try:
        with warnings.catch_warnings():  # several LoRAs are what was asked for
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "size mismatch" in line), "") or (
            lines[0] if lines else type(error).__name__
        )
        raise InputError(f"LoRA {file} does not fit this model: {reason}") from error
    if name not in pipeline.get_list_adapters().get("transformer", []):
        raise InputError(f"LoRA {file} does not fit this model: none of its modules are in it")


def _place(pipeline: Any) -> None:
    """On the card if all fits, else component by component, else layer by layer."""
    import torch

    free, _total = torch.cuda.mem_get_info()
    sizes = [
        sum(t.numel() * t.element_size() for t in [*part.parameters(), *part.buffers()])
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
    ]
    room = free - ACTIVATIONS
    if sum(sizes) <= room:
        pipeline.to("cuda")
    elif max(sizes) <= room:
        print("note: the model does not fit the GPU at once; its parts take turns", file=sys.stderr)
        pipeline.enable_model_cpu_offload()
    else:
        print("note: the model is larger than the GPU; layers take turns, slowly", file=sys.stderr)
        pipeline.enable_sequential_cpu_offload()


def _name(file: Path) -> str:
    """What tells LoRAs apart: training gives every file the same name, in folders of their own."""
    return file.absolute().parent.name if file.name == "lora.safetensors" else file.stem


@contextmanager
def _memory_errors() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QwenLoraError(
            "out of GPU memory while sampling; try a smaller --height and --width, or close other "
            "programs on this GPU"
        ) from error


# ---- checks and files ------------------------------------------------------------------------


def _lora_file(path: Path) -> Path:
    """A LoRA file, or the one of a run folder; looked into before any model is loaded."""
    from safetensors import SafetensorError, safe_open

    file = path / "lora.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no LoRA file at {file}")
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a safetensors file: {error}") from error
    if not any("lora" in name for name in names):
        raise InputError(f"{file} is not a LoRA: none of its {len(names)} tensors is named lora")
    return file


def _check_request(request: SampleRequest, output: Path) -> None:
    if not request.prompts:
        raise InputError("nothing to draw: give a prompt")
    if not request.seeds:
        raise InputError("nothing to draw: give a seed")
    if request.steps < MIN_STEPS:
        raise InputError(f"steps must be at least {MIN_STEPS}, not {request.steps}")
    if output.suffix.lower() not in IMAGE_SUFFIXES:
        known = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"--output {output} must end in one of {known}")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; name a file in it")


def _check_size(request: SampleRequest, multiple: int) -> None:
    for name, side in (("height", request.height), ("width", request.width)):
        if side is not None and (side < multiple or side % multiple):
            nearest = max(multiple, round(side / multiple) * multiple)
            raise InputError(
                f"{name} must be a multiple of {multiple} px for this model, not {side}; "
                f"{nearest} is the nearest"
            )


def _grid(pictures: Sequence[Pictures], files: Sequence[Path]) -> Image.Image:
    first = pictures[0]
    title = "LoRA " + " + ".join(_name(file) for file in files)
    columns = ["base"] * (first.base is not None) + [title] * (first.lora is not None)
    rows = [
        Row(f"{p.prompt} (seed {p.seed})", [i for i in (p.base, p.lora) if i is not None])
        for p in pictures
    ]
    return labelled_grid(columns, rows)


def _save(image: Image.Image, path: Path) -> None:
    """Whole or absent: written aside, then renamed."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(aside)
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


class _Callable(ModuleType):
    """`qwen_lora.sample(...)`: the public function and this module share their name."""

    def __call__(self, *arguments: Any, **options: Any) -> Path:
        return sample(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
