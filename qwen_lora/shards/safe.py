"""Checks that come before any parser or allocation: JSON and safetensors headers from strangers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qwen_lora.errors import ShardError

JSON_MEMBER_MAX_BYTES = 256 << 10  # a record's JSON member
TENSOR_HEADER_MAX_BYTES = 64 << 10  # a record's safetensors header

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4}


def parse_json(
    data: bytes | bytearray | memoryview, what: str, max_bytes: int = JSON_MEMBER_MAX_BYTES
) -> Any:
    """Parse JSON without duplicate keys, NaN, lone surrogates, deep nesting or excess length.

    Raises ShardError that starts with `what`.
    """
    if len(data) > max_bytes:
        raise ShardError(f"{what}: {len(data)} bytes of JSON, more than the {max_bytes} allowed")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else no_constant(digits)

    try:
        text = bytes(data).decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite
        )
        # half of a surrogate pair is no text: it could not be printed or stored
        if "\\" in text and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{what}: not valid JSON ({error})") from None


def printable(text: str) -> str:
    """Other people's text for a terminal: what could steer it is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors buffer: where its bytes are, counted from the buffer's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_tensor_header(
    data: bytes | bytearray | memoryview, what: str, max_bytes: int = TENSOR_HEADER_MAX_BYTES
) -> dict[str, TensorEntry]:
    """The entries of a safetensors buffer, checked to be exactly what the bytes hold.

    Refuses headers of more than `max_bytes`, duplicate names, unknown dtypes, holes, overlaps and
    trailing bytes, so that the library's own parser only ever sees a sane buffer. Format:
    safetensors' README.
    """
    header, base = _header(data, what, max_bytes)
    entries = {
        name: _entry(value, base, f"{what}, tensor {name!r}")
        for name, value in header.items()
        if name != "__metadata__"
    }
    position = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise ShardError(f"{what}: tensors overlap or leave a hole at byte {position}")
        position = entry.end
    if position != len(data):
        raise ShardError(f"{what}: {len(data) - position} bytes after the last tensor")
    return entries


def tensor_metadata(
    data: bytes | bytearray | memoryview, what: str, max_bytes: int = TENSOR_HEADER_MAX_BYTES
) -> dict[str, str]:
    """The texts of a safetensors header's `__metadata__`; none when it has none."""
    metadata = _header(data, what, max_bytes)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or set(map(type, metadata.values())) - {str}:
        raise ShardError(f"{what}: the safetensors metadata is not text by name")
    return metadata


def _header(
    data: bytes | bytearray | memoryview, what: str, max_bytes: int
) -> tuple[dict[str, Any], int]:
    """A safetensors header, and where it ends."""
    if len(data) < 8:
        raise ShardError(f"{what}: {len(data)} bytes are no safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > max_bytes or 8 + length > len(data):
        raise ShardError(f"{what}: a safetensors header of {length} bytes is not accepted")
    header = parse_json(data[8 : 8 + length], what, max_bytes)
    if not isinstance(header, dict):
        raise ShardError(f"{what}: the safetensors header is not an object")
    return header, 8 + length


def _entry(value: Any, base: int, what: str) -> TensorEntry:
    if not isinstance(value, Mapping) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ShardError(f"{what}: not a tensor entry")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ShardError(f"{what}: dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or len(shape) > 4 or not _naturals(offsets) or len(offsets) != 2:
        raise ShardError(f"{what}: shape {shape!r} or offsets {offsets!r} make no sense")
    size = DTYPE_BYTES[dtype]
    for side in shape:
        size *= side
    if offsets[1] - offsets[0] != size:
        raise ShardError(f"{what}: {offsets[1] - offsets[0]} bytes for {dtype} {list(shape)}")
    return TensorEntry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    """Whether value is a list of plain integers from 0 to 2^40."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 1 << 40 for number in value
    )
