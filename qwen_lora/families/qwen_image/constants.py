"""Qwen-Image's fixed numbers and texts. Source: diffusers' `QwenImagePipeline`."""

from __future__ import annotations

LATENT_CHANNELS = 16
LATENT_SCALE = 8  # pixels per latent pixel
PATCH = 2  # latent pixels per token, each side

# The prompt template, cut where special tokens part it: HEAD + TEXT + caption + TAIL.
TEMPLATE_HEAD = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>"
)
TEMPLATE_TEXT = "user\n"
TEMPLATE_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED_TOKENS = 34  # HEAD and TEXT: their hidden states are dropped
MAX_TOKENS = 1024  # kept after that; the end of the text is cut off

VAE_CONFIG_KEYS = (
    "base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "attn_scales",
    "temperal_downsample",
    "latents_mean",
    "latents_std",
)
TEXT_CONFIG_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "vocab_size",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
