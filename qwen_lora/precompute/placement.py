"""Where the two encoders live: together, one after the other, or the text encoder streamed."""

from __future__ import annotations

from typing import Literal

Placement = Literal["together", "sequential", "offload"]

TOGETHER_BYTES = 24_000_000_000  # a card sold as 24 GB
QUANTIZED_SHARE = {"none": 1.0, "int8": 0.55, "nf4": 0.35}  # of the bf16 weights, with their scales


def choose_placement(
    setting: str,
    card_bytes: int | None,
    text_weight_bytes: int,
    *,
    dtype: str = "bfloat16",
    quantization: str = "none",
) -> Placement:
    """`card_bytes` is the card's whole memory, None without a card; weights as their files (bf16).

    The choice never changes a byte of the shards: batches are the same in all three.
    """
    if setting == "together" or setting == "sequential" or setting == "offload":
        return setting  # type: ignore[return-value]
    if card_bytes is None or card_bytes >= TOGETHER_BYTES:
        return "together"
    needed = text_weight_bytes * QUANTIZED_SHARE[quantization] * (2 if dtype == "float32" else 1)
    if card_bytes < needed and quantization == "none":  # quantized weights cannot be streamed
        return "offload"
    return "sequential"
