"""A preview's latents equal those of diffusers' own pipeline; nothing around them is touched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from qwen_lora.families import family_by_name
from qwen_lora.families.qwen_image.tokens import unpack
from qwen_lora.models import resolve_model
from qwen_lora.tiny_model.build import TEXT_WIDTH
from qwen_lora.train.draw import Drawing, draw_latents, drawing_mode
from qwen_lora.train.lora import LoraSpec, add_lora

CPU = torch.device("cpu")
FAMILY = family_by_name("qwen-image")


def condition(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(tokens, TEXT_WIDTH, generator=generator).bfloat16().float()
    return embeds, torch.ones(tokens, dtype=torch.bool)  # [T, D], [T]


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    pipeline = QwenImagePipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("size", "seed", "steps"), [((8, 8), 0, 20), ((10, 16), 3, 4)])
def test_equals_diffusers_pipeline(
    tiny_model: Path,
    plain: Any,
    guidance: float,
    size: tuple[int, int],
    seed: int,
    steps: int,
) -> None:
    prompt, empty = condition(7, 1), condition(3, 2)
    guided = guidance > 1
    expected = plain(
        prompt_embeds=prompt[0][None],
        prompt_embeds_mask=prompt[1][None],
        negative_prompt_embeds=empty[0][None] if guided else None,
        negative_prompt_embeds_mask=empty[1][None] if guided else None,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
        height=size[0] * 8,
        width=size[1] * 8,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
    ).images
    config = resolve_model(str(tiny_model), ["scheduler"]).config("scheduler")
    drawing = Drawing(size, steps, guidance, seed)
    with drawing_mode(plain.transformer):
        drawn = draw_latents(plain.transformer, FAMILY, config, drawing, prompt, empty, CPU)
    assert drawn.shape == (16, *size) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, unpack(expected, *size)[0], atol=1e-4, rtol=0)


def test_guidance_matters(tiny_model: Path, plain: Any) -> None:
    """The comparison above would not see a guidance that does nothing."""
    config = resolve_model(str(tiny_model), ["scheduler"]).config("scheduler")
    prompt, empty = condition(7, 1), condition(3, 2)
    with drawing_mode(plain.transformer):
        drawn = [
            draw_latents(
                plain.transformer, FAMILY, config, Drawing((8, 8), 4, scale, 0), prompt, empty, CPU
            )
            for scale in (1.0, 4.0)
        ]
    assert float((drawn[0] - drawn[1]).abs().max()) > 1e-2


def test_the_decoder_equals_the_pipelines_pictures(tiny_model: Path, plain: Any) -> None:
    latents = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    model = resolve_model(str(tiny_model), ["vae"])
    decoder = FAMILY.load_latent_decoder(model, dtype=torch.float32)
    decoded = decoder.decode(latents, CPU)
    mean = torch.tensor(plain.vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(plain.vae.config.latents_std).view(1, -1, 1, 1)
    with torch.no_grad():
        expected = plain.vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    assert decoded.shape == (1, 3, 48, 64)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)
    assert float(decoded.std()) > 0.01
    kept = sum(weight.numel() for weight in decoder._vae.parameters())  # type: ignore[attr-defined]
    assert kept < 0.7 * sum(weight.numel() for weight in plain.vae.parameters())


def test_training_is_as_it_was(tiny_model: Path) -> None:
    """Modes, gradients and torch's generators; and no dropout while drawing."""
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    spec = LoraSpec(4, 4.0, 0.5, "orthogonal", False, "attention")
    parameters = add_lora(transformer, spec, FAMILY, seed=0)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(0.05)
    transformer.train()
    config = resolve_model(str(tiny_model), ["scheduler"]).config("scheduler")
    arguments = (config, Drawing((8, 8), 2, 4.0, 0), condition(7, 1), condition(3, 2), CPU)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = []
    for _ in range(2):
        with drawing_mode(transformer):
            drawn.append(draw_latents(transformer, FAMILY, *arguments))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert all(module.training for module in transformer.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for _, parameter in parameters)
    with pytest.raises(RuntimeError, match="inside"), drawing_mode(transformer):
        raise RuntimeError("inside")
    assert transformer.training and torch.is_grad_enabled()
