"""One sample's two tar members: JSON facts and safetensors tensors, to bytes and back.

    latents            [C, h, w] float16       or posterior_mean and posterior_std, the same shape
    prompt_embeds.i    [T_i, D] bfloat16       i-th caption, trimmed to its true length
    prompt_mask.i      [T_i] bool

Checking and finiteness need only numpy; torch is imported when tensors are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_lora.errors import ShardError
from qwen_lora.hashing import canonical_json
from qwen_lora.shards.format import RecordMeta
from qwen_lora.shards.safe import (
    JSON_MEMBER_MAX_BYTES,
    TENSOR_HEADER_MAX_BYTES,
    TensorEntry,
    parse_json,
    parse_tensor_header,
)

if TYPE_CHECKING:
    import torch

LATENT_NAMES = {"mode": ("latents",), "mean_std": ("posterior_mean", "posterior_std")}
# Exponent bits of the 16-bit floats: all ones means infinite or not a number.
_EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80}


@dataclass(frozen=True)
class RecordShape:
    """What a record's tensors must look like, from the sidecar and the manifest."""

    latent_names: tuple[str, ...]
    latent_shape: tuple[int, int, int]  # [C, h, w]
    token_counts: tuple[int, ...]  # T_i, one a caption
    text_width: int  # D

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors dtype, shape), complete."""
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in self.latent_names:
            expected[name] = ("F16", self.latent_shape)
        for index, tokens in enumerate(self.token_counts):
            expected[f"prompt_embeds.{index}"] = ("BF16", (tokens, self.text_width))
            expected[f"prompt_mask.{index}"] = ("BOOL", (tokens,))
        return expected


@dataclass(frozen=True)
class Record:
    """A decoded sample."""

    meta: RecordMeta
    tensors: dict[str, torch.Tensor]


def encode_meta(meta: RecordMeta) -> bytes:
    return canonical_json(asdict(meta))


def encode_record(meta: RecordMeta, tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, bytes]:
    """The JSON and the safetensors member. Tensors must be contiguous CPU tensors of the stored
    dtypes; no metadata is written, since safetensors orders more than one key at random.

    Raises ShardError for what a reader would refuse: too long, another dtype, not finite.
    """
    from safetensors.torch import save

    facts = encode_meta(meta)
    data = save({name: tensors[name].contiguous() for name in sorted(tensors)})
    what = f"record of {meta.source or meta.source_sha256[:12]}"
    if len(facts) > JSON_MEMBER_MAX_BYTES:
        raise ShardError(
            f"{what}: {len(facts)} bytes of JSON, more than the {JSON_MEMBER_MAX_BYTES} that a "
            "record may have; shorten its captions"
        )
    check_values(data, parse_tensor_header(data, what), what)
    return facts, data


def decode_meta(data: bytes | bytearray | memoryview, what: str = "record") -> RecordMeta:
    """Raises ShardError when a field is missing, unknown or of another type."""
    value = parse_json(data, what)
    if not isinstance(value, dict) or set(value) != set(RecordMeta.__dataclass_fields__):
        raise ShardError(f"{what}: the JSON member does not have the fields of a record")
    captions, source = value["captions"], value["source"]
    truncated = value["truncated_tokens"]
    sound = (
        (captions is None or _all(captions, str))
        and (source is None or isinstance(source, str))
        and isinstance(value["source_sha256"], str)
        and isinstance(value["group"], str)
        and isinstance(value["flipped"], bool)
        and _all(value["original_size"], int, 2)
        and _all(value["crop_box"], int, 4)
        and _all(value["bucket"], int, 2)
        and _all(truncated, int)
    )
    if not sound:
        raise ShardError(f"{what}: a field of the JSON member has the wrong type")
    return RecordMeta(
        captions=captions,
        source=source,
        source_sha256=value["source_sha256"],
        original_size=tuple(value["original_size"]),
        crop_box=tuple(value["crop_box"]),
        flipped=value["flipped"],
        bucket=tuple(value["bucket"]),
        truncated_tokens=truncated,
        group=value["group"],
    )


def _all(value: Any, kind: type, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(type(item) is kind for item in value)
        and (length is None or len(value) == length)
    )


def check_tensors(
    data: bytes | bytearray | memoryview,
    expected: RecordShape,
    what: str = "record",
    max_header_bytes: int = TENSOR_HEADER_MAX_BYTES,
) -> dict[str, TensorEntry]:
    """Check the header of a record's tensors against what the shard set says they are."""
    entries = parse_tensor_header(data, what, max_header_bytes)
    wanted = expected.tensors()
    if set(entries) != set(wanted):
        odd = sorted(set(entries) ^ set(wanted))
        raise ShardError(f"{what}: tensors missing or unknown: {', '.join(odd[:4])}")
    for name, (dtype, shape) in wanted.items():
        entry = entries[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise ShardError(
                f"{what}: {name} is {entry.dtype} {list(entry.shape)}, the shard set says "
                f"{dtype} {list(shape)}"
            )
    return entries


def unconditional_shape(data: bytes, text_width: int, what: str) -> RecordShape:
    """What the unconditional file holds: one embedding of any length, and its mask."""
    entry = parse_tensor_header(data, what).get("prompt_embeds.0")
    tokens = entry.shape[0] if entry is not None and len(entry.shape) == 2 else 0
    if not tokens:
        raise ShardError(f"{what}: no embedding")
    return RecordShape((), (0, 0, 0), (tokens,), text_width)


def check_values(
    data: bytes | bytearray | memoryview, entries: Mapping[str, TensorEntry], what: str = "record"
) -> None:
    """Raises ShardError for a NaN or infinity, or a mask byte other than 0 and 1."""
    for name, entry in entries.items():
        raw = np.frombuffer(data, np.uint8, entry.end - entry.begin, entry.begin)
        if entry.dtype == "BOOL":
            if raw.size and int(raw.max()) > 1:
                raise ShardError(f"{what}: {name} holds values other than true and false")
        elif entry.dtype not in _EXPONENT_BITS:
            raise ShardError(f"{what}: {name} is {entry.dtype}, which no record holds")
        else:
            # Bytes of the buffer may be at any address: view(), not a cast, keeps them in place.
            # Infinities and NaNs are the largest words of either sign: as signed numbers those
            # with sign 0, as unsigned ones those with sign 1. Two maxima need no temporary.
            bits = _EXPONENT_BITS[entry.dtype]
            if raw.size and (
                raw.view("<i2").max() >= bits or raw.view("<u2").max() >= 0x8000 + bits
            ):
                raise ShardError(f"{what}: {name} holds a NaN or an infinity")


def decode_tensors(
    data: bytes | bytearray | memoryview,
    expected: RecordShape,
    captions: Sequence[int] | None = None,
    what: str = "record",
) -> dict[str, torch.Tensor]:
    """The latents and the asked captions' tensors (default: all), checked.

    Latents are float16 [C, h, w], `prompt_embeds.i` bfloat16 [T_i, D], `prompt_mask.i` bool [T_i];
    memory as in `make_tensors`.
    """
    entries = check_tensors(data, expected, what)
    wanted = set(expected.latent_names)
    for index in range(len(expected.token_counts)) if captions is None else captions:
        wanted |= {f"prompt_embeds.{index}", f"prompt_mask.{index}"}
    chosen = {name: entry for name, entry in entries.items() if name in wanted}
    if len(chosen) != len(wanted):
        raise ShardError(f"{what}: there is no caption {sorted(wanted - set(chosen))}")
    check_values(data, chosen, what)
    return make_tensors(data, chosen)


def make_tensors(
    data: bytes | bytearray | memoryview, entries: Mapping[str, TensorEntry]
) -> dict[str, torch.Tensor]:
    """The tensors of checked entries: views of a buffer that can be written to, which must not
    change any more, or copies of bytes that cannot."""
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
    buffer = bytearray(data) if memoryview(data).readonly else data
    return {
        name: torch.frombuffer(
            buffer, dtype=dtypes[entry.dtype], count=math.prod(entry.shape), offset=entry.begin
        ).reshape(entry.shape)
        for name, entry in entries.items()
    }
