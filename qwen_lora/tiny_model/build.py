# ruff: noqa: TID253
"""Builds the tiny pipeline: random weights in the real classes, latent statistics to fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen_lora.errors import InputError
from qwen_lora.tiny_model.images import synthetic_images
from qwen_lora.tiny_model.tokenizer import make_tokenizer

TEXT_WIDTH = 64
LATENT_CHANNELS = 16

# Qwen/Qwen-Image's scheduler/scheduler_config.json.
SCHEDULER_CONFIG = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def write_pipeline(folder: Path, seed: int) -> None:
    """See `qwen_lora.tiny_model.write_tiny_model`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; name a new one")
    from transformers.utils import logging

    pipeline = make_pipeline(seed)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipeline.save_pretrained(str(folder))
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def make_pipeline(seed: int) -> Any:
    """A `QwenImagePipeline` on the CPU in float32; leaves torch's global random state alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = make_transformer()
        text_encoder = make_text_encoder(tokenizer)
        vae = make_vae(seed)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def make_transformer() -> Any:
    from diffusers import QwenImageTransformer2DModel

    width = 128
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    with torch.no_grad():
        # Default weights leave a block's gates near zero, so that blocks hardly count; trained
        # gates let them through. The layer makes shift, scale, gate, for attention and for the MLP.
        for block in transformer.transformer_blocks:
            for modulation in (block.img_mod[1], block.txt_mod[1]):
                modulation.bias[2 * width : 3 * width] += 1
                modulation.bias[5 * width : 6 * width] += 1
    return transformer


def make_text_encoder(
    tokenizer: Any, width: int = TEXT_WIDTH, spread: float = 0.1, tied: bool = False
) -> Any:
    """spread: of the random weights, wider than the usual 0.02 so that two layers mix visibly;
    tied: the unused output layer shares the embeddings and takes no room in the file."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [width // 32, 3 * width // 64, 3 * width // 64],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "initializer_range": spread,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=tied,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_vae(seed: int) -> Any:
    """A VAE whose `latents_mean` and `latents_std` are measured on synthetic images."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    ).eval()
    images = synthetic_images(192, 64, 64, seed=seed)  # [N, 3, H, W]
    with torch.no_grad():
        # Like a trained VAE's posterior: means that vary by about 1, with a spread of exp(-3).
        vae.quant_conv.weight[:LATENT_CHANNELS] *= 15
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.5
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
        latents = vae.encode(images[:, :, None]).latent_dist.mode()  # [N, C, 1, h, w]
    # Rounded, so that float noise between processors does not show in the config.
    mean = [round(float(value), 4) for value in latents.mean(dim=(0, 2, 3, 4))]
    std = [round(float(value), 4) for value in latents.std(dim=(0, 2, 3, 4))]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return vae
