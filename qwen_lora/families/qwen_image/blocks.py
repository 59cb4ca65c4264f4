# ruff: noqa: TID253
"""One block of the transformer, as training needs it: the mathematics of diffusers'
`QwenImageTransformerBlock` on that block's own modules, without work whose result nobody uses.

Text is never padded and attention never masked: prompts of equal length are a batch [B, T, D],
others stand one behind the other, [1, T_0 + ... + T_B-1, D], and each sample attends by itself.

B samples, n image tokens, T text tokens, H heads of width d, D = H d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from qwen_lora.families.qwen_image.adapted import project

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rotations:
    """Unit complex numbers that turn queries and keys, or their (cos, sin), for compilers."""

    image: torch.Tensor | Pair  # [n, 1, d / 2]
    text: torch.Tensor | Pair  # [T, 1, d / 2], or of all prompts one behind the other


Lengths = tuple[int, ...] | None  # tokens of each prompt, or None when they are equal


def join_texts(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Lengths]:
    """[T_i, D] each -> [B, T, D] and None, or [1, sum of T_i, D] and the lengths."""
    lengths = tuple(len(prompt) for prompt in prompts)
    if len(set(lengths)) == 1:
        return torch.stack(list(prompts)), None
    return torch.cat(list(prompts))[None], lengths


def spread(rows: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """One row a sample, [B, X], for its text tokens: [B, 1, X] or [1, sum of T_i, X]."""
    if lengths is None:
        return rows[:, None]
    return torch.cat([row.expand(n, -1) for row, n in zip(rows, lengths, strict=True)])[None]


def run_block(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    image_rows: torch.Tensor,
    text_rows: torch.Tensor,
    rotations: Rotations,
    lengths: Lengths,
    last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """image: [B, n, D]; text, lengths: as `join_texts` makes them; image_rows, text_rows: [B, 6 D],
    what the modulation layers give. Returns both; after the last block text is unfinished."""
    image_first, image_second = image_rows[:, None].chunk(2, dim=-1)  # [B, 1, 3 D]
    text_first, text_second = spread(text_rows, lengths).chunk(2, dim=-1)
    image_in, image_gate = _modulate(block.img_norm1(image), image_first)
    text_in, text_gate = _modulate(block.txt_norm1(text), text_first)
    image_out, text_out = _attend(block.attn, image_in, text_in, rotations, lengths, last)

    image = image + image_gate * image_out
    image_in, image_gate = _modulate(block.img_norm2(image), image_second)
    image = image + image_gate * _mlp(block.img_mlp, image_in)
    if text_out is not None:
        text = text + text_gate * text_out
        text_in, text_gate = _modulate(block.txt_norm2(text), text_second)
        text = text + text_gate * _mlp(block.txt_mlp, text_in)
    if image.dtype == torch.float16:  # as diffusers: float16 overflows here
        image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
    return image, text


def _modulate(x: torch.Tensor, rows: torch.Tensor) -> Pair:
    shift, scale, gate = rows.chunk(3, dim=-1)
    return x * (1 + scale) + shift, gate


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """diffusers' FeedForward with approximate GELU (its dropout is 0)."""
    up, down = mlp.net[0].proj, mlp.net[2]
    (hidden,) = project([up], x)
    (out,) = project([down], F.gelu(hidden, approximate="tanh"))
    return out


def _attend(
    attention: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    rotations: Rotations,
    lengths: Lengths,
    last: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Joint attention, text before image as in diffusers. In the last block text is only looked
    at."""
    heads, width = attention.heads, attention.inner_dim // attention.heads

    def split(x: torch.Tensor) -> torch.Tensor:
        return torch.unflatten(x, -1, (heads, width))  # [., ., H, d]

    q, k, v = map(split, project([attention.to_q, attention.to_k, attention.to_v], image))
    q = rotate(attention.norm_q(q), rotations.image)
    k = rotate(attention.norm_k(k), rotations.image)
    added = [attention.add_k_proj, attention.add_v_proj]
    if last:
        text_k, text_v = map(split, project(added, text))
        text_q = None
    else:
        text_q, text_k, text_v = map(split, project([attention.add_q_proj, *added], text))
        text_q = rotate(attention.norm_added_q(text_q), rotations.text)
    text_k = rotate(attention.norm_added_k(text_k), rotations.text)
    image_out, text_out = _joint(q, k, v, text_q, text_k, text_v, lengths)
    (image_out,) = project([attention.to_out[0]], image_out)
    if text_out is None:
        return image_out, None
    (text_out,) = project([attention.to_add_out], text_out)
    return image_out, text_out


def _joint(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_q: torch.Tensor | None,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    lengths: Lengths,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot products over text and image of each sample. Returns [B, n, D] and the text's."""
    if lengths is None:
        ranges = [(slice(None), slice(None), slice(None))]
    else:
        ends = list(accumulate(lengths, initial=0))
        ranges = [
            (slice(i, i + 1), slice(0, 1), slice(begin, end))
            for i, (begin, end) in enumerate(pairwise(ends))
        ]
    images, texts = [], []
    for sample, row, part in ranges:
        of_text = text_k[row, part].shape[1] if text_q is not None else 0
        query = q[sample] if text_q is None else torch.cat([text_q[row, part], q[sample]], dim=1)
        key = torch.cat([text_k[row, part], k[sample]], dim=1)
        value = torch.cat([text_v[row, part], v[sample]], dim=1)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        out = out.transpose(1, 2).flatten(2)  # [., tokens, D]
        images.append(out[:, of_text:])
        texts.append(out[:, :of_text])
    image = images[0] if len(images) == 1 else torch.cat(images)
    if text_q is None:
        return image, None
    return image, texts[0] if len(texts) == 1 else torch.cat(texts, dim=1)


def rotate(x: torch.Tensor, by: torch.Tensor | Pair) -> torch.Tensor:
    """Rotary embedding of neighbouring pairs (x_0, x_1), (x_2, x_3), ... in float32.

    x: [., tokens, H, d]; by: complex [tokens, 1, d / 2], or its (real, imaginary) parts.
    Complex is fewer operators when run one by one; compilers fuse the real form alone.
    """
    pairs = torch.unflatten(x.float(), -1, (-1, 2))
    if isinstance(by, torch.Tensor):
        turned = torch.view_as_real(torch.view_as_complex(pairs) * by)
    else:
        cos, sin = by
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
