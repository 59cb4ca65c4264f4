# ruff: noqa: TID253
"""The training objective: flow matching on cached latents.

    x_t = (1 - sigma) z + sigma noise,   target = noise - z,   loss = w(sigma) mean((v - target)^2)

("Flow Matching for Generative Modeling", Lipman et al., 2023, with the straight paths of rectified
flow, Liu et al., 2023; the convention of diffusers' train_dreambooth_lora_qwen_image.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from qwen_lora.errors import InputError
from qwen_lora.families import family_by_class
from qwen_lora.families.base import Family
from qwen_lora.families.modules import compute_dtype, unwrap
from qwen_lora.train.timesteps import loss_weight, round_to


@dataclass(frozen=True)
class FlowTokens:
    """Where samples are on their way to noise, and its direction, in the order of the transformer's
    tokens: a step puts nothing into another order. Losses are means over the same numbers as in the
    latents' order, gradients have the same bits."""

    noised: torch.Tensor  # [B, n, P], x_t in float32 or the compute dtype
    target: torch.Tensor  # [B, n, P] float32
    latent_size: tuple[int, int]  # [h, w]

    @classmethod
    def make(
        cls, family: Family, latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor
    ) -> FlowTokens:
        """latents and noise: [B, C, h, w]; sigmas: [B] float32 that the compute dtype holds."""
        latents, noise = latents.float(), noise.float()
        level = sigmas.to(latents.device, non_blocking=True).view(-1, 1, 1, 1)
        noised = (1 - level) * latents + level * noise  # [B, C, h, w] float32
        height, width = latents.shape[-2:]
        return cls(family.to_tokens(noised), family.to_tokens(noise - latents), (height, width))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> FlowTokens:
        return replace(self, noised=change(self.noised), target=change(self.target))


def flow_matching_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    prompt_embeds: Sequence[torch.Tensor],
    prompt_masks: Sequence[torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    weighting_scheme: str = "none",
    family: Family | None = None,
) -> torch.Tensor:
    """The loss of each sample of one micro-batch.

    transformer: the model with or without LoRA, plain, compiled or wrapped by DDP;
    latents: [B, C, h, w] float32, normalised; noise: the same shape, standard normal;
    prompt_embeds: B tensors [T_i, D]; prompt_masks: B tensors [T_i] bool, True for real tokens;
    sigmas: [B] in (0, 1] on any device, rounded here to the transformer's compute dtype;
    weighting_scheme: none, sigma_sqrt or cosmap; family: inferred from the transformer's class.

    Returns [B] float32: mean squared error of the velocity over C, h and w, times the weight.
    Prompts of different lengths are padded and masked; the losses equal those of the samples alone.
    Raises InputError for shapes that do not fit together and for a transformer class that no family
    knows, ValueError for an unknown scheme.
    """
    _check_shapes(latents, prompt_embeds, prompt_masks, noise, sigmas)
    if family is None:
        family = family_by_class(type(unwrap(transformer)).__name__)
    sigmas = round_to(sigmas, compute_dtype(transformer))  # [B] float32, where they were
    tokens = FlowTokens.make(family, latents, noise, sigmas)
    return token_loss(
        transformer, tokens, prompt_embeds, prompt_masks, sigmas, weighting_scheme, family
    )


def token_loss(
    transformer: torch.nn.Module,
    tokens: FlowTokens,
    prompt_embeds: Sequence[torch.Tensor],
    prompt_masks: Sequence[torch.Tensor],
    sigmas: torch.Tensor,
    weighting_scheme: str,
    family: Family,
) -> torch.Tensor:
    """`flow_matching_loss` of samples that are noised already, at sigmas [B] float32 that the
    compute dtype holds. Returns [B] float32."""
    velocity = family.token_velocity(
        transformer, tokens.noised, tokens.latent_size, sigmas, prompt_embeds, prompt_masks
    )
    error = F.mse_loss(velocity, tokens.target, reduction="none")  # [B, n, P]
    losses = error.flatten(1).sum(1) / error[0].numel()  # not mean: its gradient is [B, n, P] too
    if weighting_scheme == "none":
        return losses
    return loss_weight(sigmas.to(losses.device, non_blocking=True), weighting_scheme) * losses


def _check_shapes(
    latents: torch.Tensor,
    prompt_embeds: Sequence[torch.Tensor],
    prompt_masks: Sequence[torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
) -> None:
    if latents.ndim != 4 or latents.shape != noise.shape:
        raise InputError(
            f"latents and noise must both be [B, C, h, w]; got {tuple(latents.shape)} and "
            f"{tuple(noise.shape)}"
        )
    batch = latents.shape[0]
    if sigmas.shape != (batch,) or len(prompt_embeds) != batch or len(prompt_masks) != batch:
        raise InputError(
            f"{batch} latents need {batch} sigmas, prompt embeddings and masks; got sigmas "
            f"{tuple(sigmas.shape)}, {len(prompt_embeds)} embeddings, {len(prompt_masks)} masks"
        )
    for index, (embeds, mask) in enumerate(zip(prompt_embeds, prompt_masks, strict=True)):
        if embeds.ndim != 2 or mask.shape != embeds.shape[:1]:
            raise InputError(
                f"prompt {index}: embeddings must be [T, D] and the mask [T]; got "
                f"{tuple(embeds.shape)} and {tuple(mask.shape)}"
            )
