"""Noise levels and loss weights against diffusers' functions and scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from qwen_lora.config.schema import Settings
from qwen_lora.families import family_by_name
from qwen_lora.train.timesteps import (
    SIGMA_MIN,
    TimestepSampling,
    constant_shift,
    density,
    loss_weight,
    round_to,
)

U = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]


@pytest.mark.parametrize("scheme", ["none", "mode"])
@pytest.mark.parametrize("mode_scale", [1.29, 0.5, -0.5])
def test_density_of_uniform_numbers_is_diffusers(scheme: str, mode_scale: float) -> None:
    theirs = compute_density_for_timestep_sampling(
        scheme, 500, 0.0, 1.0, mode_scale, generator=torch.Generator().manual_seed(3)
    )
    u = torch.rand(500, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(density(u, scheme, 0.0, 1.0, mode_scale), theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
def test_logit_normal_is_diffusers(mean: float, std: float) -> None:
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 500, mean, std, generator=torch.Generator().manual_seed(3)
    )
    normal = torch.normal(0.0, 1.0, (500,), generator=torch.Generator().manual_seed(3))
    u = torch.special.ndtr(normal.double())  # the number whose normal quantile they drew
    ours = density(u, "logit_normal", mean, std)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "logit_normal", "mode"])
def test_direction_is_that_of_the_training_script(name: str, tiny_model) -> None:
    """The script takes timesteps[(u * 1000).long()] from the scheduler's descending list."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_model / "scheduler")
    mapped = density(U, name)
    index = (mapped * scheduler.config.num_train_timesteps).long().clamp(0, 999)
    theirs = scheduler.timesteps[index] / 1000
    ours = TimestepSampling(density=name).sigmas(U, (8, 8))
    # theirs steps in thousandths
    assert (ours - theirs).abs().max() <= 0.001 + 1e-6
    assert ours.dtype == torch.float32


def test_sigmas_stay_between_the_smallest_timestep_and_one() -> None:
    for name in ("none", "logit_normal", "mode"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            sampling = TimestepSampling(density=name, mode_scale=5.0, compute_dtype=dtype)
            sigmas = sampling.sigmas(U, (8, 8))
            assert sigmas.max() <= 1
            assert sigmas.min() >= round_to(torch.tensor(SIGMA_MIN), dtype)
            assert torch.isfinite(loss_weight(sigmas, "sigma_sqrt")).all()
            assert torch.equal(sigmas, sigmas.to(dtype).float())


def test_constant_shift_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    shifted = constant_shift(plain.sigmas.double(), 3.0)
    torch.testing.assert_close(shifted.float(), scheduler.sigmas)
    # 1 is no shift
    ours = TimestepSampling(shift=_from("1")).sigmas(U, (8, 8))
    torch.testing.assert_close(ours, TimestepSampling().sigmas(U, (8, 8)))


def _from(shift: str):
    settings = Settings.model_validate({"timestep_shift": float(shift)})
    sampling = TimestepSampling.from_settings(
        settings,
        compute_dtype=torch.float32,
        family=family_by_name("qwen-image"),
        scheduler_config={},
    )
    return sampling.shift


def test_model_shift_is_the_schedulers_own(tiny_model) -> None:
    """The sigmas of an inference schedule, whose terminal the scheduler stretches to."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_model / "scheduler")
    config = dict(scheduler.config)
    sampling = TimestepSampling.from_settings(
        Settings.model_validate({"timestep_shift": "model"}),
        compute_dtype=torch.float32,
        family=family_by_name("qwen-image"),
        scheduler_config=config,
    )
    height, width = 64, 96  # latent pixels
    tokens = (height // 2) * (width // 2)
    slope = (config["max_shift"] - config["base_shift"]) / (
        config["max_image_seq_len"] - config["base_image_seq_len"]
    )
    mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
    sigmas = torch.linspace(1, 0.001, 50, dtype=torch.float64)
    shifted = np.exp(mu) / (np.exp(mu) + 1 / sigmas - 1)
    expected = 1 - (1 - shifted) * (1 - config["shift_terminal"])
    torch.testing.assert_close(sampling.sigmas(1 - sigmas, (height, width)), expected.float())


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_are_diffusers(scheme: str) -> None:
    sigmas = torch.linspace(0.001, 1, 300)
    theirs = compute_loss_weighting_for_sd3(scheme, sigmas)
    torch.testing.assert_close(loss_weight(sigmas, scheme), theirs, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="sigma_squared"):
        loss_weight(sigmas, "sigma_squared")
