# ruff: noqa: TID253
"""The two encoders of a run: loaded when first needed, released when told, always in one mode."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.families.base import LatentEncoder, PromptEncoder
from qwen_lora.models import ModelFolder
from qwen_lora.precompute.placement import Placement, choose_placement


def pick_device(local_rank: int = 0) -> torch.device:
    """This rank's CUDA card, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def placement_on(device: torch.device, model: ModelFolder, settings: Settings) -> Placement:
    card_bytes = None
    if device.type == "cuda":
        card_bytes = torch.cuda.get_device_properties(device).total_memory
    weights = model.component("text_encoder").glob("*.safetensors")
    return choose_placement(
        settings.encoder_placement,
        card_bytes,
        sum(file.stat().st_size for file in weights),
        dtype=settings.text_encoder_dtype,
        quantization=settings.text_encoder_quantization,
    )


class Encoders:
    """Loads an encoder at its first use, so that a run without work loads none."""

    def __init__(
        self,
        model: ModelFolder,
        settings: Settings,
        device: torch.device,
        placement: Placement,
        quiet: bool = False,
    ) -> None:
        self._model, self._settings = model, settings
        self.device = device
        self._quiet = quiet
        self.placement = placement
        self._text: PromptEncoder | None = None
        self._latent: LatentEncoder | None = None

    def text(self) -> PromptEncoder:
        if self._text is None:
            self._say("loading the text encoder")
            self._text = self._model.family.load_prompt_encoder(
                self._model,
                device=self.device,
                dtype=getattr(torch, self._settings.text_encoder_dtype),
                quantization=self._settings.text_encoder_quantization,
                offload=self.placement == "offload",
                prefix_cache=self._settings.text_prefix_cache,
            )
        return self._text

    def latent(self) -> LatentEncoder:
        if self._latent is None:
            self._say("loading the VAE")
            self._latent = self._model.family.load_latent_encoder(
                self._model, device=self.device, dtype=getattr(torch, self._settings.vae_dtype)
            )
        return self._latent

    def release_text(self) -> None:
        """Give the text encoder's memory back before the VAE needs it."""
        self._text = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _say(self, text: str) -> None:
        if not self._quiet:
            where = " (streamed from host memory)" if self.placement == "offload" else ""
            print(f"{text} on {self.device}{where if 'text' in text else ''}", file=sys.stderr)


@contextmanager
def encoding_mode(threads: int) -> Iterator[None]:
    """The numeric mode in which records are made: fixed CPU threads, true float32 convolutions, no
    algorithm search, no gradients. Restored on leaving."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            torch.no_grad(),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            yield
    except torch.OutOfMemoryError as error:
        raise QwenLoraError(
            "the card ran out of memory while encoding; lower vae_batch_size or text_batch_size, "
            f"or set encoder_placement to sequential or offload ({str(error).splitlines()[0]})"
        ) from error
    finally:
        torch.set_num_threads(before)
