# ruff: noqa: TID253
"""Captions to prompt embeddings: Qwen2.5-VL's text model in Qwen-Image's chat template.

Equal to `QwenImagePipeline.encode_prompt` for captions that contain no special tokens. Where they
do, the pipeline would obey them; here a caption is text and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from qwen_lora.errors import InputError
from qwen_lora.families.base import EncodedCaption, TokenCount
from qwen_lora.families.qwen_image.constants import (
    DROPPED_TOKENS,
    MAX_TOKENS,
    TEMPLATE_HEAD,
    TEMPLATE_TAIL,
    TEMPLATE_TEXT,
)
from qwen_lora.families.qwen_image.loading import (
    QUANTIZATIONS,
    damage_explained,
    empty_module,
    load_weights,
    quantize_linears,
)
from qwen_lora.families.qwen_image.packed_text import (
    Prefix,
    forward_packed,
    make_prefix,
    use_packed_attention,
)
from qwen_lora.models import ModelFolder


class QwenPromptTokenizer:
    """See `families.base.PromptTokenizer`.

    Added tokens split a text before anything else happens to it, so the template with a caption in
    it may be tokenised in three parts: up to the last added token before the caption, the text
    between (`user`, a line break, the caption), and the rest.
    """

    def __init__(self, model: ModelFolder) -> None:
        from tokenizers import Tokenizer
        from transformers import Qwen2Tokenizer

        folder = model.component("tokenizer")
        with damage_explained(folder):
            backend = Qwen2Tokenizer.from_pretrained(str(folder)).backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        # The same tokenizer without its added tokens: whatever a caption says is plain text to it.
        facts = json.loads(backend.to_str())
        facts["added_tokens"] = []
        facts["post_processor"] = None
        self._plain = Tokenizer.from_str(json.dumps(facts))
        self._head: list[int] = backend.encode(TEMPLATE_HEAD, add_special_tokens=False).ids
        self._tail: list[int] = backend.encode(TEMPLATE_TAIL, add_special_tokens=False).ids
        self.prefix: list[int] = self._head + self._plain.encode(TEMPLATE_TEXT).ids
        if len(self.prefix) != DROPPED_TOKENS:
            raise InputError(
                f"{folder}: the prompt template has {len(self.prefix)} tokens before the caption "
                f"instead of {DROPPED_TOKENS}; this is not a Qwen-Image tokenizer"
            )

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of the whole template with each caption in it, not truncated."""
        texts = self._plain.encode_batch([TEMPLATE_TEXT + caption for caption in captions])
        return [self._head + text.ids + self._tail for text in texts]

    def count(self, captions: Sequence[str]) -> list[TokenCount]:
        """Kept tokens, and those cut off the end (of the caption with the template's end)."""
        lengths = [len(ids) - DROPPED_TOKENS for ids in self.ids(captions)]
        return [
            TokenCount(tokens=min(length, MAX_TOKENS), truncated=max(0, length - MAX_TOKENS))
            for length in lengths
        ]


def _text_model_name(key: str) -> str | None:
    """Checkpoint key -> name in `Qwen2_5_VLTextModel`; None for vision tower and lm_head.

    Both layouts of transformers are known: `model.layers.0...` beside `visual...`, as published,
    and `model.language_model.layers.0...` beside `model.visual...`.
    """
    if key.startswith(("visual.", "model.visual.", "lm_head.")) or "rotary_emb" in key:
        return None
    for prefix in ("model.language_model.", "language_model.", "model."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


class QwenPromptEncoder:
    """See `families.base.PromptEncoder`."""

    def __init__(
        self,
        model: ModelFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "none",
        offload: bool = False,
        prefix_cache: bool = True,
    ) -> None:
        if quantization not in QUANTIZATIONS:
            known = ", ".join(QUANTIZATIONS)
            raise InputError(f"unknown text encoder quantization {quantization!r}; known: {known}")
        if offload and quantization != "none":
            raise InputError(
                f"a text encoder in {quantization} cannot be streamed from host memory; "
                "choose one of the two"
            )
        self._tokenizer = QwenPromptTokenizer(model)
        self._device = device
        self._module = _load_text_model(
            model, torch.device("cpu") if offload else device, dtype, quantization
        )
        use_packed_attention(self._module)
        self.text_width: int = self._module.config.hidden_size
        if offload:
            from accelerate import cpu_offload

            # Each layer's weights visit the device while it runs; the mathematics are the same.
            cpu_offload(self._module, execution_device=device, offload_buffers=True)
        self._prefix: Prefix | None = None
        if prefix_cache:
            with torch.no_grad():
                self._prefix = make_prefix(self._module, self._tokenizer.prefix, device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[EncodedCaption]:
        """One forward pass over all captions. Raises InputError for none at all."""
        if not captions:
            raise InputError("no captions to encode")
        rows = [ids[: DROPPED_TOKENS + MAX_TOKENS] for ids in self._tokenizer.ids(captions)]
        # The states are those after the final norm, as `hidden_states[-1]` is.
        if self._prefix is not None and all(map(self._begins_as_usual, rows)):
            rows = [ids[DROPPED_TOKENS:] for ids in rows]
            kept = forward_packed(self._module, rows, self._device, self._prefix)
        else:
            whole = forward_packed(self._module, rows, self._device)
            kept = [states[DROPPED_TOKENS:] for states in whole]
        return [
            EncodedCaption(states.cpu().clone(), torch.ones(len(states), dtype=torch.bool))
            for states in kept
        ]

    def _begins_as_usual(self, ids: Sequence[int]) -> bool:
        """A caption that begins with a line break may share a token with the template's own."""
        return ids[:DROPPED_TOKENS] == self._tokenizer.prefix


def _load_text_model(
    model: ModelFolder, device: torch.device, dtype: torch.dtype, quantization: str
) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    folder = model.component("text_encoder")
    with damage_explained(folder):
        config = Qwen2_5_VLConfig.from_pretrained(str(folder)).text_config
        module = empty_module(lambda: Qwen2_5_VLTextModel._from_config(config))
    if quantization != "none":
        quantize_linears(module.get_submodule("layers"), quantization, dtype)
    load_weights(module, folder, device=device, dtype=dtype, rename=_text_model_name)
    return module
