"""Qwen-Image and Qwen-Image-2512 (`QwenImagePipeline`). Imports torch only when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_lora.families.qwen_image import constants, facts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from qwen_lora.families.base import (
        ForwardOptions,
        LatentDecoder,
        LatentEncoder,
        PromptEncoder,
        PromptTokenizer,
    )
    from qwen_lora.models import ModelFolder


class QwenImage:
    """See `families.base.Family` for what each method answers."""

    name = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    transformer_class = "QwenImageTransformer2DModel"
    latent_channels = constants.LATENT_CHANNELS
    latent_scale = constants.LATENT_SCALE
    image_multiple = constants.LATENT_SCALE * constants.PATCH

    # ---- stage 1 ----------------------------------------------------------------------------

    def encoder_facts(self, model: ModelFolder) -> dict[str, Any]:
        return {"vae": facts.vae_facts(model.config("vae")), "text": facts.text_facts(model)}

    def text_width(self, model: ModelFolder) -> int:
        return facts.text_width(model.config("text_encoder"))

    def load_tokenizer(self, model: ModelFolder) -> PromptTokenizer:
        from qwen_lora.families.qwen_image.text import QwenPromptTokenizer

        return QwenPromptTokenizer(model)

    def load_prompt_encoder(
        self,
        model: ModelFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "none",
        offload: bool = False,
        prefix_cache: bool = True,
    ) -> PromptEncoder:
        from qwen_lora.families.qwen_image.text import QwenPromptEncoder

        return QwenPromptEncoder(
            model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            offload=offload,
            prefix_cache=prefix_cache,
        )

    def load_latent_encoder(
        self, model: ModelFolder, *, device: torch.device, dtype: torch.dtype
    ) -> LatentEncoder:
        from qwen_lora.families.qwen_image.vae import QwenLatentEncoder

        facts.vae_facts(model.config("vae"))  # a VAE of another shape is refused before loading
        return QwenLatentEncoder(model, device, dtype)

    # ---- stage 2 ----------------------------------------------------------------------------

    def transformer_facts(self, config: Mapping[str, Any]) -> dict[str, int]:
        return facts.transformer_facts(config)

    def load_transformer(
        self,
        model: ModelFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        base_precision: str = "bf16",
        low_precision_products: str = "none",
        modulation_table: Path | None = None,
        blocks_on_device: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> torch.nn.Module:
        from qwen_lora.families.qwen_image.transformer import load_transformer

        return load_transformer(
            model,
            device=device,
            dtype=dtype,
            base_precision=base_precision,
            low_precision_products=low_precision_products,
            modulation_table=modulation_table,
            blocks_on_device=blocks_on_device,
            mesh=mesh,
        )

    def block_count(self, config: Mapping[str, Any]) -> int:
        return facts.block_count(config)

    def empty_transformer(
        self,
        model: ModelFolder,
        *,
        blocks: int,
        dtype: torch.dtype,
        base_precision: str = "bf16",
        low_precision_products: str = "none",
        tabled: bool = False,
    ) -> torch.nn.Module:
        from qwen_lora.families.qwen_image.skeleton import skeleton
        from qwen_lora.families.qwen_image.transformer import make_empty

        return skeleton(
            make_empty(model, blocks),
            dtype=dtype,
            base_precision=base_precision,
            low_precision_products=low_precision_products,
            tabled=tabled,
        )

    def compiled_bytes(
        self,
        transformer: torch.nn.Module,
        latent_size: tuple[int, int],
        text_tokens: Sequence[int],
        budget: float,
    ) -> int:
        from qwen_lora.families.qwen_image.compiled import kept_bytes

        return kept_bytes(transformer, self.image_tokens(latent_size), text_tokens, budget)

    def stored_bytes(self, transformer: torch.nn.Module) -> int:
        from qwen_lora.families.qwen_image.skeleton import stored_bytes

        return stored_bytes(transformer)

    def low_precision_product(
        self, kind: str, side: int, device: torch.device
    ) -> Callable[[], torch.Tensor]:
        from qwen_lora.families.qwen_image.scaled import bare_product

        return bare_product(kind, side, device)

    def make_modulation_table(
        self, model: ModelFolder, path: Path, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        from qwen_lora.families.qwen_image.transformer import make_modulation_table

        make_modulation_table(model, path, device=device, dtype=dtype)

    def prepare_training(self, transformer: torch.nn.Module, options: ForwardOptions) -> None:
        from qwen_lora.families.qwen_image.transformer import prepare_training

        prepare_training(transformer, options)

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        from qwen_lora.families.qwen_image.tokens import pack

        return pack(latents)

    def token_velocity(
        self,
        transformer: Callable[..., Any],
        tokens: torch.Tensor,
        latent_size: tuple[int, int],
        sigmas: torch.Tensor,
        prompt_embeds: Sequence[torch.Tensor],
        prompt_masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        from qwen_lora.families.qwen_image.transformer import token_velocity

        return token_velocity(transformer, tokens, latent_size, sigmas, prompt_embeds, prompt_masks)

    def velocity(
        self,
        transformer: Callable[..., Any],
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        prompt_embeds: Sequence[torch.Tensor],
        prompt_masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        from qwen_lora.families.qwen_image.transformer import velocity

        return velocity(transformer, latents, sigmas, prompt_embeds, prompt_masks)

    def lora_target_modules(
        self, transformer: torch.nn.Module, targets: str | Sequence[str]
    ) -> list[str]:
        from qwen_lora.families.qwen_image.transformer import lora_target_modules

        return lora_target_modules(transformer, targets)

    def timestep_shift(
        self, scheduler_config: Mapping[str, Any], latent_size: tuple[int, int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        from qwen_lora.families.qwen_image.transformer import timestep_shift

        return timestep_shift(scheduler_config, latent_size)

    def inference_sigmas(
        self, scheduler_config: Mapping[str, Any], latent_size: tuple[int, int], steps: int
    ) -> torch.Tensor:
        from qwen_lora.families.qwen_image.sampling import inference_sigmas

        return inference_sigmas(scheduler_config, self.image_tokens(latent_size), steps)

    def guided_velocity(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float
    ) -> torch.Tensor:
        from qwen_lora.families.qwen_image.sampling import guided_velocity

        return guided_velocity(conditional, unconditional, scale)

    def load_latent_decoder(self, model: ModelFolder, *, dtype: torch.dtype) -> LatentDecoder:
        from qwen_lora.families.qwen_image.sampling import QwenLatentDecoder

        facts.vae_facts(model.config("vae"))  # a VAE of another shape is refused before loading
        return QwenLatentDecoder(model, dtype)

    def attention_shape(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)

    def image_tokens(self, latent_size: tuple[int, int]) -> int:
        return (latent_size[0] // constants.PATCH) * (latent_size[1] // constants.PATCH)

    def pipeline(self) -> Any:
        from diffusers import QwenImagePipeline

        return QwenImagePipeline
