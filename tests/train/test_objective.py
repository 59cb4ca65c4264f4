"""The objective against the computation of diffusers' train_dreambooth_lora_qwen_image.py, written
here from its formula with diffusers' own transformer and packing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft import LoraConfig

from qwen_lora.errors import InputError
from qwen_lora.families import family_by_name
from qwen_lora.families.modules import compute_dtype, unwrap
from qwen_lora.train.objective import FlowTokens, flow_matching_loss, token_loss

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Batch:
    latents: torch.Tensor
    embeds: list[torch.Tensor]
    masks: list[torch.Tensor]
    noise: torch.Tensor
    sigmas: torch.Tensor


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(tiny_model / "transformer").eval()


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> QwenImageTransformer2DModel:
    """With a LoRA whose B is not zero, so that A and B both have gradients."""
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_model / "transformer").eval()
    transformer.requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def make_batch(
    transformer: QwenImageTransformer2DModel, lengths: list[int], size: tuple[int, int] = (8, 12)
) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    channels = transformer.config.in_channels // 4
    shape = (len(lengths), channels, *size)
    width = transformer.config.joint_attention_dim
    return Batch(
        latents=torch.randn(shape, generator=generator),
        embeds=[torch.randn(length, width, generator=generator) for length in lengths],
        masks=[torch.ones(length, dtype=torch.bool) for length in lengths],
        noise=torch.randn(shape, generator=generator),
        sigmas=0.05 + 0.9 * torch.rand(len(lengths), generator=generator),
    )


def reference(
    transformer: QwenImageTransformer2DModel, batch: Batch, scheme: str = "none"
) -> torch.Tensor:
    """[B] losses: prompts padded with zeros and always masked, as the script's encode_prompt."""
    size, channels, height, width = batch.latents.shape
    longest = max(len(embeds) for embeds in batch.embeds)
    embeds = torch.stack(
        [torch.nn.functional.pad(e, (0, 0, 0, longest - len(e))) for e in batch.embeds]
    )
    mask = torch.stack([torch.nn.functional.pad(m, (0, longest - len(m))) for m in batch.masks])
    model_input = batch.latents.unsqueeze(2)  # the script's latents have a frame axis
    noise = batch.noise.unsqueeze(2)
    sigmas = batch.sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1.0 - sigmas) * model_input + sigmas * noise
    packed = QwenImagePipeline._pack_latents(
        noisy.permute(0, 2, 1, 3, 4), size, channels, height, width
    )
    prediction = transformer(
        hidden_states=packed,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask.long(),
        timestep=batch.sigmas,  # the script: timesteps / 1000
        img_shapes=[[(1, height // 2, width // 2)]] * size,
        return_dict=False,
    )[0]
    prediction = QwenImagePipeline._unpack_latents(prediction, height * 8, width * 8, 8)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    target = noise - model_input
    return torch.mean(
        (weighting.float() * (prediction.float() - target.float()) ** 2).reshape(size, -1), 1
    )


def losses(transformer: torch.nn.Module, batch: Batch, scheme: str = "none") -> torch.Tensor:
    return flow_matching_loss(
        transformer,
        batch.latents,
        batch.embeds,
        batch.masks,
        batch.noise,
        batch.sigmas,
        weighting_scheme=scheme,
    )


def one(batch: Batch, index: int) -> Batch:
    part = slice(index, index + 1)
    return Batch(
        batch.latents[part],
        batch.embeds[part],
        batch.masks[part],
        batch.noise[part],
        batch.sigmas[part],
    )


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("lengths", [[5], [7, 7], [3, 11, 6, 1]])
@torch.no_grad()
def test_losses_equal_the_training_script(base, lengths: list[int], scheme: str) -> None:
    batch = make_batch(base, lengths)
    ours = losses(base, batch, scheme)
    assert ours.shape == (len(lengths),)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference(base, batch, scheme), rtol=1e-6, atol=0)
    singles = torch.cat([reference(base, one(batch, k), scheme) for k in range(len(lengths))])
    torch.testing.assert_close(ours, singles, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lengths", [[5], [3, 11, 6]])
def test_lora_gradients_equal_the_training_script(adapted, lengths: list[int]) -> None:
    batch = make_batch(adapted, lengths)

    def gradients(value: torch.Tensor) -> torch.Tensor:
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        parts = torch.autograd.grad(value, parameters)
        assert all(part.abs().max() > 0 for part in parts)
        return torch.cat([part.flatten() for part in parts])

    ours = gradients(losses(adapted, batch).sum())
    theirs = gradients(reference(adapted, batch).sum())
    singles = sum(gradients(reference(adapted, one(batch, k)).sum()) for k in range(len(lengths)))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert (ours - singles).norm() / singles.norm() < 1e-5


@torch.no_grad()
def test_prompts_of_equal_length_get_no_mask(base) -> None:
    seen = []
    hook = base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states_mask"]),
        with_kwargs=True,
    )
    try:
        losses(base, make_batch(base, [5]))
        losses(base, make_batch(base, [6, 6]))
        losses(base, make_batch(base, [5, 6]))
    finally:
        hook.remove()
    assert seen[0] is None and seen[1] is None
    assert seen[2] is not None


@torch.no_grad()
def test_tokens_that_a_mask_hides_do_not_count(base) -> None:
    batch = make_batch(base, [5])
    longer = Batch(
        batch.latents,
        [torch.cat([batch.embeds[0], 100 * torch.ones_like(batch.embeds[0][:3])])],
        [torch.tensor([True] * 5 + [False] * 3)],
        batch.noise,
        batch.sigmas,
    )
    torch.testing.assert_close(losses(base, longer), losses(base, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_rounds_sigma_once(tiny_model: Path, dtype: torch.dtype) -> None:
    transformer = QwenImageTransformer2DModel.from_pretrained(
        tiny_model / "transformer", torch_dtype=dtype
    ).eval()
    batch = make_batch(transformer, [4, 9])
    rounded = Batch(
        batch.latents, batch.embeds, batch.masks, batch.noise, batch.sigmas.to(dtype).float()
    )
    times = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(kwargs["timestep"]), with_kwargs=True
    )
    ours = losses(transformer, batch)
    hook.remove()
    assert ours.dtype == torch.float32
    assert torch.equal(ours, losses(transformer, rounded))
    assert torch.equal(times[0].float(), rounded.sigmas)
    assert not torch.equal(batch.sigmas, rounded.sigmas)
    # close to float32's losses at the rounded sigmas
    transformer.float()
    torch.testing.assert_close(ours, losses(transformer, rounded), rtol=0.05, atol=0)


@torch.no_grad()
def test_wrappers_and_an_explicit_family(base) -> None:
    batch = make_batch(base, [4, 4])
    expected = losses(base, batch)

    class Wrapper(torch.nn.Module):  # as DistributedDataParallel holds its module
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    assert unwrap(Wrapper(base)) is base
    assert unwrap(torch.compile(base, backend="eager")) is base
    assert torch.equal(losses(Wrapper(base), batch), expected)
    explicit = flow_matching_loss(
        base,
        batch.latents,
        batch.embeds,
        batch.masks,
        batch.noise,
        batch.sigmas,
        family=family_by_name("qwen-image"),
    )
    assert torch.equal(explicit, expected)
    with pytest.raises(InputError, match="Linear"):
        losses(torch.nn.Linear(1, 1), batch)


def test_the_compute_dtype_is_the_bases(tiny_model: Path) -> None:
    transformer = QwenImageTransformer2DModel.from_pretrained(
        tiny_model / "transformer", torch_dtype=torch.bfloat16
    )
    transformer.add_adapter(LoraConfig(r=2, target_modules=[*TARGETS, "img_in", "linear_1"]))
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert compute_dtype(transformer) == torch.bfloat16


@torch.no_grad()
def test_shapes_are_checked(base) -> None:
    batch = make_batch(base, [4, 5])
    with pytest.raises(InputError, match="latents and noise"):
        losses(base, Batch(batch.latents, batch.embeds, batch.masks, batch.noise[:1], batch.sigmas))
    with pytest.raises(InputError, match="2 sigmas"):
        losses(base, Batch(batch.latents, batch.embeds, batch.masks, batch.noise, batch.sigmas[:1]))
    with pytest.raises(InputError, match="prompt 1"):
        masks = [batch.masks[0], batch.masks[0]]
        losses(base, Batch(batch.latents, batch.embeds, masks, batch.noise, batch.sigmas))


@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_tokens_noised_ahead_give_the_gradients_of_the_reference(
    adapted: QwenImageTransformer2DModel, scheme: str
) -> None:
    batch = make_batch(adapted, [5, 5])
    family = family_by_name("qwen-image")
    tokens = FlowTokens.make(family, batch.latents, batch.noise, batch.sigmas)
    parameters = [p for name, p in adapted.named_parameters() if "lora_" in name]
    found = token_loss(adapted, tokens, batch.embeds, batch.masks, batch.sigmas, scheme, family)
    expected = reference(adapted, batch, scheme)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    pairs = [torch.autograd.grad(loss.sum(), parameters) for loss in (found, expected)]
    ours, theirs = (torch.cat([gradient.flatten() for gradient in one]) for one in pairs)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
