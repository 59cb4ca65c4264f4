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


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one block: image's [B, n, H, d], text's [B, T, H, d] or of all
    prompts one behind the other. The last block has no text queries."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text_q: torch.Tensor | None
    text_k: torch.Tensor
    text_v: torch.Tensor


def join_texts(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Lengths]:
    """[T_i, D] each -> [B, T, D] and None, or [1, sum of T_i, D] and the lengths."""
    lengths = tuple(len(prompt) for prompt in prompts)
    if len(set(lengths)) == 1:
        return torch.stack(list(prompts)), None
    return torch.cat(list(prompts))[None], lengths


def owners(lengths: Lengths, device: torch.device) -> torch.Tensor | None:
    """For each text token the sample that it belongs to, [sum of T_i]; None for equal lengths."""
    if lengths is None:
        return None
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(counts, output_size=sum(lengths))


def run_block(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    image_rows: torch.Tensor,
    text_rows: torch.Tensor,
    rotations: Rotations,
    owner: torch.Tensor | None,
    lengths: Lengths,
    last: bool,
) -> Pair:
    """image: [B, n, D]; text, lengths: as `join_texts` makes them; owner: of `owners`; image_rows,
    text_rows: [B, 6 D], what the modulation layers give. Returns both; after the last block text
    is unfinished."""
    of_image, of_text = modulations(image_rows, None), modulations(text_rows, owner)
    heads = before_attention(block, image, text, of_image, of_text, rotations, last)
    image_out, text_out = attend(heads, lengths)
    return after_attention(block, image, text, image_out, text_out, of_image, of_text)


def modulations(rows: torch.Tensor, owner: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """(shift, scale, gate) of both norms from [B, 6 D]: six of [B, 1, D] or [1, sum of T_i, D]."""
    rows = rows[:, None] if owner is None else rows[owner][None]
    return rows.chunk(6, dim=-1)


def before_attention(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    of_image: Sequence[torch.Tensor],
    of_text: Sequence[torch.Tensor],
    rotations: Rotations,
    last: bool,
) -> Heads:
    """The first norms and all projections; of_image, of_text: as `modulations` gives them. In the
    last block text is only looked at."""
    image = _modulate(block.img_norm1(image), *of_image[:2])
    text = _modulate(block.txt_norm1(text), *of_text[:2])
    attention = block.attn
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
    return Heads(q, k, v, text_q, text_k, text_v)


def after_attention(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    image_out: torch.Tensor,
    text_out: torch.Tensor | None,
    of_image: Sequence[torch.Tensor],
    of_text: Sequence[torch.Tensor],
) -> Pair:
    """Output projections and both MLPs; image_out, text_out: what `attend` gives."""
    image = _projected(block.attn.to_out[0], image, image_out, of_image[2])
    image = image + of_image[5] * _mlp(
        block.img_mlp, _modulate(block.img_norm2(image), *of_image[3:5])
    )
    if text_out is not None:
        text = _projected(block.attn.to_add_out, text, text_out, of_text[2])
        text = text + of_text[5] * _mlp(
            block.txt_mlp, _modulate(block.txt_norm2(text), *of_text[3:5])
        )
    if image.dtype == torch.float16:  # as diffusers: float16 overflows here
        image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
    return image, text


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def _projected(
    layer: Any, x: torch.Tensor, attended: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """A function of its own, so that the product is gone before the MLP needs memory."""
    (out,) = project([layer], attended)
    return x + gate * out


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """diffusers' FeedForward with approximate GELU (its dropout is 0)."""
    up, down = mlp.net[0].proj, mlp.net[2]
    (hidden,) = project([up], x)
    (out,) = project([down], F.gelu(hidden, approximate="tanh"))
    return out


def attend(heads: Heads, lengths: Lengths) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Joint scaled dot products over text and image of each sample, text first as in diffusers.
    Returns [B, n, D] and the text's."""
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
        query = heads.q[sample]
        of_text = 0
        if heads.text_q is not None:
            text_q = heads.text_q[row, part]
            query, of_text = torch.cat([text_q, query], dim=1), text_q.shape[1]
        key = torch.cat([heads.text_k[row, part], heads.k[sample]], dim=1)
        value = torch.cat([heads.text_v[row, part], heads.v[sample]], dim=1)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        out = out.transpose(1, 2).flatten(2)  # [., tokens, D]
        images.append(out[:, of_text:])
        texts.append(out[:, :of_text])
    image = images[0] if len(images) == 1 else torch.cat(images)
    if heads.text_q is None:
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
