"""Packing, velocity, targets and the scheduler's shift against diffusers' own."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_lora.errors import InputError
from qwen_lora.families import family_by_class, family_by_name
from qwen_lora.families.modules import compute_dtype
from qwen_lora.families.qwen_image.tokens import pack, unpack
from qwen_lora.models import ModelFolder

CPU = torch.device("cpu")
HEIGHT, WIDTH = 8, 12  # latent pixels


def make_batch(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    return {
        "latents": torch.randn(batch, 16, HEIGHT, WIDTH, generator=generator),
        "sigmas": torch.rand(batch, generator=generator),
        "prompt_embeds": [torch.randn(length, 64, generator=generator) for length in lengths],
        "prompt_masks": [torch.ones(length, dtype=torch.bool) for length in lengths],
    }


def one(batch: dict[str, Any], index: int) -> dict[str, Any]:
    return {name: value[index : index + 1] for name, value in batch.items()}


def reference(transformer: Any, sample: dict[str, Any]) -> torch.Tensor:
    """One sample through diffusers' pipeline helpers. Returns [1, C, h, w]."""
    from diffusers import QwenImagePipeline

    latents = sample["latents"]
    batch, channels, height, width = latents.shape
    tokens = QwenImagePipeline._pack_latents(latents, batch, channels, height, width)
    prediction = transformer(
        hidden_states=tokens,
        timestep=sample["sigmas"],
        encoder_hidden_states=torch.stack(sample["prompt_embeds"]),
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(prediction, height * 8, width * 8, 8)[:, :, 0]


class Recorder(torch.nn.Module):
    """Passes a call on and keeps what it was called with."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> Any:
        self.seen = inputs
        return self.module(**inputs)


def test_pack_equals_diffusers() -> None:
    from diffusers import QwenImagePipeline

    latents = torch.randn(2, 16, HEIGHT, WIDTH)
    tokens = QwenImagePipeline._pack_latents(latents, 2, 16, HEIGHT, WIDTH)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, HEIGHT, WIDTH), latents)
    crooked = torch.cat([torch.zeros(1), latents.flatten()])[1:].view_as(latents)
    assert torch.equal(pack(crooked), tokens)
    assert torch.equal(pack(latents.bfloat16()), tokens.bfloat16())
    assert torch.equal(pack(latents.transpose(2, 3).contiguous().transpose(2, 3)), tokens)
    for size in ((2, 2), (2, 6), (6, 2), (4, 4)):
        small = torch.randn(1, 16, *size)
        expected = QwenImagePipeline._pack_latents(small, 1, 16, *size)
        assert torch.equal(pack(small), expected), size
    with_gradient = latents.clone().requires_grad_()
    pack(with_gradient).square().sum().backward()
    assert torch.equal(with_gradient.grad, 2 * latents)


@torch.no_grad()
def test_velocity_equals_diffusers(model: ModelFolder, transformer: torch.nn.Module) -> None:
    batch = make_batch([9])
    predicted = model.family.velocity(transformer, **batch)
    assert predicted.shape == batch["latents"].shape and predicted.dtype == torch.float32
    assert torch.equal(predicted, reference(transformer, batch))
    assert predicted.std() > 0.1


@torch.no_grad()
def test_a_padded_batch_equals_its_samples(
    model: ModelFolder, transformer: torch.nn.Module
) -> None:
    batch = make_batch([3, 17, 9])
    together = model.family.velocity(transformer, **batch)
    for index in range(3):
        alone = model.family.velocity(transformer, **one(batch, index))
        torch.testing.assert_close(together[index : index + 1], alone, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_no_mask_without_padding(model: ModelFolder, transformer: torch.nn.Module) -> None:
    recorder = Recorder(transformer)
    for lengths, masked in (([5], False), ([5, 5], False), ([5, 6], True)):
        model.family.velocity(recorder, **make_batch(lengths))
        mask = recorder.seen["encoder_hidden_states_mask"]
        assert (mask is not None) == masked
        if masked:
            assert mask.dtype == torch.bool and mask.tolist() == [[True] * 5 + [False], [True] * 6]


@torch.no_grad()
def test_a_mask_inside_a_prompt_is_kept(model: ModelFolder, transformer: torch.nn.Module) -> None:
    batch = make_batch([6])
    whole = model.family.velocity(transformer, **batch)
    batch["prompt_masks"][0][2] = False
    masked = model.family.velocity(transformer, **batch)
    assert not torch.allclose(whole, masked)
    batch["prompt_embeds"][0][2] = 1e3  # a masked token is not seen
    assert torch.equal(model.family.velocity(transformer, **batch), masked)


@torch.no_grad()
def test_bfloat16(model: ModelFolder) -> None:
    half = model.family.load_transformer(model, device=CPU, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert compute_dtype(Recorder(half)) == torch.bfloat16
    recorder = Recorder(half)
    predicted = model.family.velocity(recorder, **make_batch([4, 7]))
    assert predicted.dtype == torch.float32
    assert recorder.seen["hidden_states"].dtype == torch.bfloat16
    assert recorder.seen["timestep"].dtype == torch.bfloat16


def test_compute_dtype_ignores_lora_weights(model: ModelFolder) -> None:
    from peft import LoraConfig

    half = model.family.load_transformer(model, device=CPU, dtype=torch.bfloat16)
    half.add_adapter(LoraConfig(r=2, target_modules=["img_in", "to_q"]))
    for parameter in half.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert compute_dtype(half) == torch.bfloat16


def test_shapes_that_do_not_fit(model: ModelFolder, transformer: torch.nn.Module) -> None:
    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            model.family.velocity(transformer, **{**make_batch([4, 4]), **changes})

    refuse("latents have 48 channels, the transformer takes 16", latents=torch.zeros(2, 48, 8, 8))
    refuse("are .32. wide, the transformer takes 64", prompt_embeds=[torch.zeros(4, 32)] * 2)
    refuse("cannot be cut into 2 x 2", latents=torch.zeros(2, 16, 7, 8))
    refuse("do not make a batch", sigmas=torch.zeros(1))
    refuse("expected .T, D. and .T.", prompt_masks=[torch.ones(5, dtype=torch.bool)] * 2)


def test_loaded_weights_equal_diffusers(model: ModelFolder, pipeline: Any) -> None:
    loaded = model.family.load_transformer(model, device=CPU, dtype=torch.float32)
    expected = pipeline.transformer.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_weights_that_do_not_fit_the_config(model: ModelFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(model.component("transformer"), tmp_path / "transformer")
    other = dataclasses.replace(model, path=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"num_layers": 3}, "lacks 32 weights"),
        ({"num_layers": 1}, "no place for"),
        ({"joint_attention_dim": 32}, "its config asks for"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=message):
            model.family.load_transformer(other, device=CPU, dtype=torch.float32)


def test_damaged_weights(model: ModelFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(model.component("transformer"), tmp_path / "transformer")
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is damaged"):
        model.family.load_transformer(
            dataclasses.replace(model, path=tmp_path), device=CPU, dtype=torch.float32
        )


def test_an_nf4_base_trains(model: ModelFolder, transformer: torch.nn.Module) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    small = model.family.load_transformer(
        model, device=CPU, dtype=torch.float32, base_precision="nf4"
    )
    blocks = [m for m in small.transformer_blocks.modules() if isinstance(m, torch.nn.Linear)]
    kind = bitsandbytes.nn.Linear4bit
    assert len(blocks) == 2 * 14 and all(isinstance(linear, kind) for linear in blocks)
    assert small.proj_out.weight.dtype == small.img_in.weight.dtype == torch.float32
    size = sum(p.numel() * p.element_size() for p in small.transformer_blocks.parameters())
    exact = sum(p.numel() * p.element_size() for p in transformer.transformer_blocks.parameters())
    assert size < exact / 6

    batch = make_batch([4, 6])
    with torch.no_grad():
        reference = model.family.velocity(transformer, **batch)
        error = (model.family.velocity(small, **batch) - reference).norm() / reference.norm()
    assert 1e-5 < error < 0.3

    targets = model.family.lora_target_modules(small, "all-linear")
    small.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=targets))
    model.family.velocity(small, **batch).square().mean().backward()
    trained = {n: p for n, p in small.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)
    up = [p for name, p in trained.items() if "lora_B" in name]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in up)


# ---- LoRA targets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "first", "last"),
    [
        ("attention", 4, 4),
        ("attention+text", 8, 6),
        ("all-linear", 12, 8),
        ("all-linear+mod", 14, 10),
    ],
)
def test_named_target_sets(
    targets: str, first: int, last: int, model: ModelFolder, transformer: torch.nn.Module
) -> None:
    names = model.family.lora_target_modules(transformer, targets)
    assert len(names) == len(set(names)) == first + last
    assert sum(name.startswith("transformer_blocks.0.") for name in names) == first
    for name in names:
        assert isinstance(transformer.get_submodule(name), torch.nn.Linear)


def test_left_out_modules_are_those_without_gradient(model: ModelFolder) -> None:
    """Every linear of the blocks gets a gradient, except those that no set contains."""
    whole = model.family.load_transformer(model, device=CPU, dtype=torch.float32)
    whole.requires_grad_(True)
    model.family.velocity(whole, **make_batch([5])).square().mean().backward()
    linears = {
        f"transformer_blocks.{name}": module
        for name, module in whole.transformer_blocks.named_modules()
        if isinstance(module, torch.nn.Linear)
    }

    def is_dead(module: torch.nn.Linear) -> bool:
        return module.weight.grad is None or bool((module.weight.grad == 0).all())

    dead = {name for name, module in linears.items() if is_dead(module)}
    chosen = set(model.family.lora_target_modules(whole, "all-linear+mod"))
    assert len(dead) == 4 and chosen == set(linears) - dead


def test_a_list_of_name_endings(model: ModelFolder, transformer: torch.nn.Module) -> None:
    def choose(targets: list[str]) -> list[str]:
        return model.family.lora_target_modules(transformer, targets)

    assert choose(["to_q", "img_in"]) == [
        "img_in",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
    ]
    assert choose(["add_q_proj"]) == ["transformer_blocks.0.attn.add_q_proj"]
    assert choose(["transformer_blocks.1.attn.to_k"]) == ["transformer_blocks.1.attn.to_k"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("atention", "unknown LoRA target set 'atention'; known: attention, "),
        (["to_q", "to_z"], "'to_z' is the end of no linear layer"),
        (["o_q"], "is the end of no linear layer"),  # whole name parts only
        (["attn"], "is the end of no linear layer"),
        (["transformer_blocks.1.attn.add_q_proj"], "only layers that get no gradient"),
        ([], "is empty"),
    ],
)
def test_wrong_targets(
    targets: Any, message: str, model: ModelFolder, transformer: torch.nn.Module
) -> None:
    with pytest.raises(InputError, match=message):
        model.family.lora_target_modules(transformer, targets)


# ---- time, facts, lookup -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (208, 112)])
def test_timestep_shift_is_the_schedulers(size: tuple[int, int], model: ModelFolder) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = model.config("scheduler")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    tokens = size[0] * size[1] // 4
    assert model.family.image_tokens(size) == tokens
    steps = 100_000  # many, since the scheduler stretches its own last sigma to the terminal one
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, 256, 8192, 0.5, 0.9))
    shift = model.family.timestep_shift(config, size)
    ours = shift(torch.from_numpy(sigmas).float())
    torch.testing.assert_close(ours, scheduler.sigmas[:-1], atol=1e-4, rtol=0)
    edge = shift(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(edge, torch.tensor([1.0, 0.02]), atol=1e-6, rtol=0)


def test_timestep_shift_without_dynamic_shifting(model: ModelFolder) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {"use_dynamic_shifting": False, "shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    sigmas = np.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=sigmas)
    ours = model.family.timestep_shift(config, (64, 64))(torch.from_numpy(sigmas))
    torch.testing.assert_close(ours, scheduler.sigmas[:-1])


def test_transformer_facts(model: ModelFolder) -> None:
    config = model.config("transformer")
    facts = model.family.transformer_facts(config)
    assert facts == {"latent_channels": 16, "text_width": 64}
    with pytest.raises(InputError, match="no 'in_channels'"):
        model.family.transformer_facts({})


def test_families_are_found_by_name_and_class(model: ModelFolder) -> None:
    from diffusers import QwenImagePipeline

    family = family_by_name("qwen-image")
    assert family is family_by_class("QwenImagePipeline")
    assert family is family_by_class("QwenImageTransformer2DModel") is model.family
    assert family.pipeline() is QwenImagePipeline
    assert family.image_multiple == 16
    with pytest.raises(InputError, match="this version knows: qwen-image"):
        family_by_name("flux")
