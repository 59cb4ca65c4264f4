# ruff: noqa: TID253
"""Noise levels: from a uniform number to sigma, and the loss weight of a sigma.

sigma runs from 0 (image) to 1 (noise). The densities are those of diffusers'
`compute_density_for_timestep_sampling` (from "Scaling Rectified Flow Transformers", Esser et al.,
2024, section 3.1), as maps of a uniform u. Its result indexes a descending list of timesteps in
diffusers' training scripts, so sigma = 1 - density(u).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from qwen_lora.config.schema import Settings
    from qwen_lora.families.base import Family

SIGMA_MIN = 0.001  # the smallest sigma of the 1000 training timesteps

Density = Literal["none", "logit_normal", "mode"]
Shift = Callable[[torch.Tensor], torch.Tensor]  # sigmas to sigmas


@dataclass(frozen=True)
class TimestepSampling:
    """How noise levels are drawn. `shift` gives the shift for a latent size [h, w]."""

    density: Density = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: Callable[[tuple[int, int]], Shift] | None = None
    compute_dtype: torch.dtype = torch.float32

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        compute_dtype: torch.dtype,
        family: Family,
        scheduler_config: Mapping[str, Any],
    ) -> TimestepSampling:
        """The sampling that the settings ask for; `timestep_shift: model` reads the scheduler's."""
        setting = settings.timestep_shift
        shift: Callable[[tuple[int, int]], Shift] | None
        if setting == "none":
            shift = None
        elif setting == "model":
            shift = _ModelShift(family, scheduler_config)
        else:
            shift = _ConstantShift(float(setting))
        return cls(
            density=settings.timestep_sampling,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            mode_scale=settings.mode_scale,
            shift=shift,
            compute_dtype=compute_dtype,
        )

    def sigmas(self, u: torch.Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        """u: [B] in [0, 1). Returns [B] float32 in [0.001, 1], rounded to the compute dtype."""
        sigmas = 1 - density(
            u.double(), self.density, self.logit_mean, self.logit_std, self.mode_scale
        )
        sigmas = sigmas.clamp(SIGMA_MIN, 1)
        if self.shift is not None:
            sigmas = self.shift(latent_size)(sigmas).clamp(SIGMA_MIN, 1)
        return round_to(sigmas, self.compute_dtype)


@dataclass(frozen=True)
class _ConstantShift:
    by: float

    def __call__(self, latent_size: tuple[int, int]) -> Shift:
        return lambda sigmas: constant_shift(sigmas, self.by)


@dataclass(frozen=True)
class _ModelShift:
    family: Family
    scheduler_config: Mapping[str, Any]

    def __call__(self, latent_size: tuple[int, int]) -> Shift:
        return self.family.timestep_shift(self.scheduler_config, latent_size)


def density(
    u: torch.Tensor,
    name: Density,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> torch.Tensor:
    """Map uniform numbers as diffusers' `compute_density_for_timestep_sampling` does.

    logit_normal takes u through the normal's inverse distribution function, so that an even spread
    of u stays even in the density. u: [B] in [0, 1]; returns [B] of the same dtype.
    """
    if name == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    if name == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def constant_shift(sigmas: torch.Tensor, by: float) -> torch.Tensor:
    """The scheduler's static shift: s * sigma / (1 + (s - 1) * sigma)."""
    return by * sigmas / (1 + (by - 1) * sigmas)


def round_to(sigmas: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values that `dtype` holds exactly: the time that the model gets is the time that made
    x_t. Rounding twice changes nothing."""
    return sigmas.float().to(dtype).float()


def loss_weight(sigmas: torch.Tensor, scheme: str) -> torch.Tensor:
    """Weight of each sample's loss, as diffusers' `compute_loss_weighting_for_sd3`.

    sigmas: [B] float32; scheme: none, sigma_sqrt or cosmap. Returns [B] float32.
    Raises ValueError for another scheme.
    """
    sigmas = sigmas.float()
    if scheme == "none":
        return torch.ones_like(sigmas)
    if scheme == "sigma_sqrt":
        return sigmas**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    raise ValueError(f"loss weighting {scheme!r} is not one of none, sigma_sqrt, cosmap")
