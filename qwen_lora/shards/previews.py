"""What lets training show pictures without a VAE: a linear map from latents to RGB, and prompts.

    rgb-<sha256[:12]>.json                the map, fitted to the set's own images
    previews-<sha256[:12]>.safetensors    preview prompts with their embeddings

docs/shards.md specifies both. Torch is imported when the prompts' tensors are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen_lora.errors import ShardError
from qwen_lora.hashing import canonical_json
from qwen_lora.shards.format import FORMAT_MAJOR, FORMAT_MINOR, Manifest
from qwen_lora.shards.manifest import read_listed
from qwen_lora.shards.record import RecordShape, check_tensors, check_values, make_tensors
from qwen_lora.shards.safe import TensorEntry, parse_json, parse_tensor_header, tensor_metadata
from qwen_lora.shards.store import Place, opened_store

if TYPE_CHECKING:
    import torch

RGB_MAX_SCALE = 8  # pixels a side: a coarser latent is drawn at less than the image's size
RGB_MAX_BYTES = 16 << 20  # 64 channels and 8 x 8 pixels need about 1.5 MiB
RGB_DIGITS = 5  # significant digits of every number
_NUMBER_MAX = 1e6  # with it, float16 latents cannot make a sum overflow float32
PROMPTS_HEADER_MAX_BYTES = 4 << 20  # the prompts stand in the header
_PROMPTS_KEY = "prompts"


@dataclass(frozen=True)
class RgbMap:
    """RGB of the `scale` x `scale` pixels of a latent position, linear in its 3 x 3 neighbourhood.

    C latent channels, normalised latents as in the records.
    """

    weight: NDArray[np.float32]  # [9 * C, 3 * scale * scale]
    bias: NDArray[np.float32]  # [3 * scale * scale]
    scale: int  # pixels a side of what one latent position becomes
    mean_abs_error: float  # on the images it was fitted to, of RGB in [0, 1]

    def apply(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[C, h, w] -> RGB [h * scale, w * scale, 3]; borders repeat their edge."""
        _, height, width = latents.shape
        patches = self.apply_rows(neighbourhoods(latents))
        rgb = patches.reshape(height, width, 3, self.scale, self.scale)
        image = rgb.transpose(0, 3, 1, 4, 2)  # [h, scale, w, scale, 3]
        return image.reshape(height * self.scale, width * self.scale, 3)

    def apply_rows(self, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Neighbourhoods [N, 9 * C] -> patches [N, 3 * scale * scale], by colour, row, column."""
        rgb = rows @ self.weight + self.bias
        return (rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def neighbourhoods(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """[C, h, w] -> [h * w, 9 * C]: by channel, row and column; borders repeat their edge."""
    channels, height, width = latents.shape
    padded = np.pad(latents, ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows.transpose(1, 2, 0, 3, 4).reshape(height * width, 9 * channels)


@dataclass(frozen=True)
class PreviewPrompt:
    """A prompt that previews draw, encoded by stage 1."""

    prompt: str
    prompt_embeds: torch.Tensor  # [T, D] bf16
    prompt_mask: torch.Tensor  # [T] bool


# ---- the map -------------------------------------------------------------------------------------


def encode_rgb(rgb: RgbMap) -> bytes:
    """The map's file: canonical JSON. Raises ShardError for what a reader would refuse."""
    channels = len(rgb.weight) // 9
    data = canonical_json(
        {
            "format": [FORMAT_MAJOR, FORMAT_MINOR],
            "latent_channels": channels,
            "scale": rgb.scale,
            "weight": round_digits(rgb.weight).tolist(),
            "bias": round_digits(rgb.bias).tolist(),
            "mean_abs_error": float(round_digits(rgb.mean_abs_error)),
        }
    )
    decode_rgb(data, channels, RGB_MAX_SCALE, "new latent-to-RGB map")
    return data


def round_digits(values: Any, digits: int = RGB_DIGITS) -> NDArray[np.float64]:
    """`values`, any shape, to so many significant decimal digits; -0 becomes 0."""
    exact = np.asarray(values, np.float64)
    rounded = [float(f"{value:.{digits - 1}e}") + 0.0 for value in exact.ravel().tolist()]
    return np.array(rounded, np.float64).reshape(exact.shape)


def decode_rgb(data: bytes, latent_channels: int, latent_scale: int, what: str) -> RgbMap:
    """Raises ShardError unless the map is whole, finite and for latents of this kind."""
    value = parse_json(data, what, RGB_MAX_BYTES)
    try:
        if value["format"][0] != FORMAT_MAJOR:
            raise ShardError(f"{what}: format {value['format']} needs another version of qwen-lora")
        channels, scale = value["latent_channels"], value["scale"]
        if type(channels) is not int or channels != latent_channels:
            raise ValueError(f"latent_channels is not the set's {latent_channels}")
        if type(scale) is not int or not 1 <= scale <= min(latent_scale, RGB_MAX_SCALE):
            raise ValueError(f"scale is not from 1 to {min(latent_scale, RGB_MAX_SCALE)}")
        patch = 3 * scale * scale
        rows = value["weight"]
        if not isinstance(rows, list) or len(rows) != 9 * channels:
            raise ValueError(f"weight is not a list of {9 * channels} rows")
        weight = np.array([_numbers(row, patch) for row in rows], np.float32)
        bias = np.array(_numbers(value["bias"], patch), np.float32)
        (error,) = _numbers([value["mean_abs_error"]], 1)
        return RgbMap(weight, bias, scale, float(error))
    except (LookupError, TypeError, ValueError) as problem:
        raise ShardError(f"{what}: not a latent-to-RGB map ({problem})") from None


def _numbers(values: Any, count: int) -> list[float]:
    """`values`, if they are `count` numbers of at most _NUMBER_MAX. Raises ValueError."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"not a list of {count} numbers")
    if set(map(type, values)) - {int, float} or not all(abs(v) <= _NUMBER_MAX for v in values):
        raise ValueError(f"not numbers of at most {_NUMBER_MAX:g}")
    return values


def read_rgb(place: Place, manifest: Manifest) -> RgbMap | None:
    """The set's map, None when it has none. Raises ShardError."""
    entry = manifest.rgb
    if entry is None:
        return None
    with opened_store(place) as store:
        what = store.where(entry.name)
        if entry.bytes > RGB_MAX_BYTES:
            raise ShardError(
                f"{what}: {entry.bytes} bytes are more than a latent-to-RGB map can have"
            )
        data = read_listed(store, entry)
    return decode_rgb(data, manifest.latent_channels, manifest.latent_scale, what)


# ---- the prompts ---------------------------------------------------------------------------------


def encode_previews(prompts: Sequence[PreviewPrompt]) -> bytes:
    """The prompts' file: at least one prompt, CPU tensors of the stored dtypes.

    Raises ShardError for what a reader would refuse.
    """
    from safetensors.torch import save

    tensors = {}
    for index, prompt in enumerate(prompts):
        tensors[f"prompt_embeds.{index}"] = prompt.prompt_embeds.contiguous()
        tensors[f"prompt_mask.{index}"] = prompt.prompt_mask.contiguous()
    # One key: safetensors orders several at random.
    texts = canonical_json([prompt.prompt for prompt in prompts]).decode("ascii")
    data: bytes = save(tensors, metadata={_PROMPTS_KEY: texts})
    width = prompts[0].prompt_embeds.shape[-1]
    _check_previews(data, width, "new preview prompts")
    return data


def decode_previews(data: bytes, text_width: int, what: str) -> list[PreviewPrompt]:
    """Raises ShardError for other tensors than the prompts', another width, a value not finite."""
    prompts, entries = _check_previews(data, text_width, what)
    tensors = make_tensors(data, entries)
    return [
        PreviewPrompt(prompt, tensors[f"prompt_embeds.{index}"], tensors[f"prompt_mask.{index}"])
        for index, prompt in enumerate(prompts)
    ]


def _check_previews(
    data: bytes, text_width: int, what: str
) -> tuple[list[str], dict[str, TensorEntry]]:
    """The prompts and the entries of their tensors, all values checked."""
    prompts = _prompts(data, what)
    entries = parse_tensor_header(data, what, PROMPTS_HEADER_MAX_BYTES)
    lengths = []
    for index in range(len(prompts)):
        embeds = entries.get(f"prompt_embeds.{index}")
        lengths.append(embeds.shape[0] if embeds is not None and embeds.shape else 0)
    if not all(lengths):
        raise ShardError(f"{what}: a prompt without an embedding")
    shape = RecordShape((), (0, 0, 0), tuple(lengths), text_width)
    entries = check_tensors(data, shape, what, PROMPTS_HEADER_MAX_BYTES)
    check_values(data, entries, what)
    return prompts, entries


def _prompts(data: bytes, what: str) -> list[str]:
    text = tensor_metadata(data, what, PROMPTS_HEADER_MAX_BYTES).get(_PROMPTS_KEY)
    if text is None:
        raise ShardError(f"{what}: no prompts in the metadata")
    prompts = parse_json(text.encode(), what, PROMPTS_HEADER_MAX_BYTES)
    if not isinstance(prompts, list) or not prompts or set(map(type, prompts)) - {str}:
        raise ShardError(f"{what}: the prompts in the metadata are not a list of texts")
    return prompts


def read_previews(place: Place, manifest: Manifest) -> list[PreviewPrompt]:
    """The set's preview prompts, none when it has none. Raises ShardError."""
    if manifest.previews is None:
        return []
    with opened_store(place) as store:
        what = store.where(manifest.previews.name)
        return decode_previews(read_listed(store, manifest.previews), manifest.text_width, what)


def read_prompts(place: Place, manifest: Manifest) -> list[str]:
    """The texts of the set's preview prompts, checked as `read_previews` does, without torch."""
    if manifest.previews is None:
        return []
    with opened_store(place) as store:
        what = store.where(manifest.previews.name)
        return _check_previews(read_listed(store, manifest.previews), manifest.text_width, what)[0]
