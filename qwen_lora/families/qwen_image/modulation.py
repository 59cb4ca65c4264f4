# ruff: noqa: TID253
"""What the modulation layers give, as a table over the noise levels.

`img_mod` and `txt_mod` hold a third of the model's weights and see nothing but the time: every
block computes Linear(silu(time embedding)). A run in bfloat16 can draw 1,281 noise levels, so with
the base frozen the outputs fit in a file, and those weights need not be loaded. (The idea is Draw
Things' and DiffusionKit's, for inference with SD3 and FLUX.)

L blocks, D the model's width, R rows of noise levels, B samples. A row is [L, 2, 6 D]: for each
block the image stream's and the text stream's (shift, scale, gate) of both norms.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from qwen_lora.errors import QwenLoraError
from qwen_lora.families.modules import ADAPTER

LAYERS = ("img_mod.1", "txt_mod.1")


def bf16_levels() -> torch.Tensor:
    """0 and every bfloat16 from 2^-10 to 1: what a sigma in [0.001, 1] can be, and the time that
    Edit-2511's `zero_cond_t` asks for. [1282] float32."""
    first, last = (
        int(torch.tensor(value).bfloat16().view(torch.int16)) for value in (2.0**-10, 1.0)
    )
    bits = torch.arange(first, last + 1, dtype=torch.int16)
    return torch.cat([torch.zeros(1), bits.view(torch.bfloat16).float()])


class ModulationTable:
    """A table in a memory-mapped file: opening it reads nothing but the list of levels.

    Raises QwenLoraError for a file that is damaged or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="pt") as file:
                self.rows = file.get_tensor("rows")  # [R, L, 2, 6 D], on disk
                levels = file.get_tensor("levels").tolist()
                self._hashes: list[str] = json.loads(file.metadata()["sha256"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error
        self._row_of = {level: row for row, level in enumerate(levels)}
        if len(self._hashes) != len(self.rows) or len(self._row_of) != len(self.rows):
            raise self._damaged()
        self._checked: set[int] = set()

    def look_up(self, sigmas: torch.Tensor, device: torch.device) -> torch.Tensor:
        """sigmas: [B] float32 on the CPU. Returns [B, L, 2, 6 D] on `device`, without waiting for
        it. Each row's hash is checked at its first use."""
        wanted = []
        for sigma in sigmas.tolist():
            if (row := self._row_of.get(sigma)) is None:
                raise QwenLoraError(
                    f"noise level {sigma} is not in the table of modulation; set "
                    "modulation_table: false"
                )
            if row not in self._checked:
                if row_hash(self.rows[row]) != self._hashes[row]:
                    raise self._damaged()
                self._checked.add(row)
            wanted.append(row)
        found: torch.Tensor = self.rows[wanted]
        return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found

    def _damaged(self) -> QwenLoraError:
        return QwenLoraError(f"{self.path} is damaged; delete it, and it is made again")


def row_hash(row: torch.Tensor) -> str:
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().data).hexdigest()


def modulation_rows(
    transformer: Any, sigmas: torch.Tensor, time: torch.Tensor
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """A function from a block's index to its two rows, [B, 6 D] each; from the table that
    `transformer.modulation_table` is, if it has one. time: [B, D], of the model.

    A LoRA on a modulation layer is added to what the table says.
    """
    blocks = transformer.transformer_blocks
    table: ModulationTable | None = getattr(transformer, "modulation_table", None)
    activated = F.silu(time)
    if table is None:
        return lambda index: (
            blocks[index].img_mod[1](activated),
            blocks[index].txt_mod[1](activated),
        )
    found = table.look_up(sigmas, time.device)

    def rows(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        block = blocks[index]
        of_image, of_text = found[:, index].unbind(1)
        return (
            _with_lora(block.img_mod[1], of_image, activated),
            _with_lora(block.txt_mod[1], of_text, activated),
        )

    return rows


def _with_lora(layer: Any, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(layer, LoraLayer) or layer.disable_adapters:
        return base
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    delta: torch.Tensor = up(down(layer.lora_dropout[ADAPTER](x)))
    scaling: float = layer.scaling[ADAPTER]
    return base + delta * scaling


class TabledLinear(torch.nn.Linear):
    """Stands where a modulation layer's weights would be; PEFT can put a LoRA on it."""

    def __init__(self, linear: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        del self.weight  # a buffer tells PEFT the device and the type
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "this layer's output is in the modulation table, its weights are nowhere"
        )


# ---- making one --------------------------------------------------------------------------------


def write_table(
    path: Path,
    levels: torch.Tensor,
    embed_time: Callable[[torch.Tensor], torch.Tensor],
    layer: Callable[[int, str], tuple[torch.Tensor, torch.Tensor]],
    blocks: int,
    progress: Callable[[int], None] = lambda blocks: None,
) -> None:
    """Write a table into the empty file at `path`, block by block: one layer is in memory.

    levels: [R] float32; embed_time: levels [1] -> [1, D]; layer(block, name) -> weight [6 D, D] and
    bias [6 D] on the device and in the type to compute in. Embeddings are computed one by one, as
    for a batch of one in training.
    """
    activated = torch.cat([F.silu(embed_time(level[None])) for level in levels])  # [R, D]
    shape = (len(levels), blocks, len(LAYERS), 6 * activated.shape[1])
    tensors = {"levels": levels, "rows": activated.new_empty((), device="cpu").expand(shape)}
    begin = _write_head(path, tensors, [""] * len(levels))
    numbers = math.prod(shape)
    size = activated.element_size()
    _reserve(path, begin, numbers * size)
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=begin + numbers * size)
    rows = torch.empty(0, dtype=activated.dtype)
    rows.set_(storage, begin // size, shape)  # type: ignore[call-overload]
    for block in range(blocks):
        for stream, name in enumerate(LAYERS):
            rows[:, block, stream] = F.linear(activated, *layer(block, name)).cpu()
        progress(block + 1)
    hashes = [row_hash(row) for row in rows]
    del rows, storage
    assert _write_head(path, tensors, hashes) == begin


def _reserve(path: Path, begin: int, count: int) -> None:
    """Take the space on the disk now: writing into a mapped hole of a full disk kills a process."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), begin, count)
            return
        file.seek(begin)
        for first in range(0, count, 1 << 20):
            file.write(bytes(min(1 << 20, count - first)))


def _write_head(path: Path, tensors: dict[str, torch.Tensor], hashes: list[str]) -> int:
    """A safetensors header and the levels; returns where the rows begin. Its length is that of
    hashes, whatever they are."""
    levels, rows = tensors["levels"], tensors["rows"]
    metadata = {"sha256": json.dumps([value.ljust(64, "-") for value in hashes])}
    after = levels.numel() * 4
    header = json.dumps(
        {
            "__metadata__": metadata,
            "levels": _entry("F32", levels, 0),
            "rows": _entry(_NAMES[rows.dtype], rows, after),
        }
    ).encode()
    header += b" " * (-(8 + len(header) + after) % 64)
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(levels.contiguous().numpy().tobytes())
        return file.tell()


_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def _entry(dtype: str, tensor: torch.Tensor, begin: int) -> dict[str, Any]:
    end = begin + tensor.numel() * tensor.element_size()
    return {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
