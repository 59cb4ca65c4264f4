"""The recipe of the trained tiny model, a few steps of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.precompute.run import precompute
from tools.emoji_model.evaluate import Emoji, ranks_of_originals
from tools.emoji_model.images import augmented, on_white, read_images
from tools.emoji_model.text import build_tokenizer
from tools.emoji_model.transformer import (
    CONFIG,
    Cache,
    PromptGroup,
    TransformerRecipe,
    batch_loss,
    read_cache,
    train_transformer,
)
from tools.emoji_model.vae import (
    CONFIG as VAE_CONFIG,
)
from tools.emoji_model.vae import (
    VaeRecipe,
    loss_parts,
    measure_latents,
    single_frame,
    train_vae,
    whole_vae,
)

VAE = VaeRecipe(steps=4, batch=2, save_every=2, compiled=False)
TRANSFORMER = TransformerRecipe(steps=4, batch=4, warmup=1, save_every=2, compiled=False)


@pytest.fixture
def images() -> torch.Tensor:
    """[6, 4, 32, 32] uint8: a coloured square each, transparent around."""
    pixels = torch.zeros(6, 4, 32, 32, dtype=torch.uint8)
    for number in range(6):
        pixels[number, :, 8:24, 4:20] = torch.tensor([40 * number, 200, 255 - 40 * number, 255])[
            :, None, None
        ].byte()
    return pixels


def test_the_2d_weights_are_the_3d_vae_for_one_picture(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    module = AutoencoderKLQwenImage(**VAE_CONFIG)
    single_frame(module)
    pixels = on_white(images)[:, :, None]
    vae = whole_vae(module)
    with torch.no_grad():
        moments = module.quant_conv(module.encoder(pixels))
        drawn = module.decoder(module.post_quant_conv(moments[:, :16]))
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mode()).sample
    torch.testing.assert_close(posterior.mode(), moments[:, :16], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded, drawn.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_vae_training_continues_to_the_same_weights(tmp_path: Path, images: torch.Tensor) -> None:
    whole = train_vae(tmp_path / "whole", images, VAE)
    train_vae_stopped(tmp_path / "parts", images)
    parts = train_vae(tmp_path / "parts", images, VAE)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = train_vae(tmp_path / "other", images, replace(VAE, seed=1))
    assert not torch.equal(fresh.encoder.conv_in.weight, whole.encoder.conv_in.weight)


def train_vae_stopped(folder: Path, images: torch.Tensor) -> None:
    """Two steps of the four, as if the power had failed after the first save."""
    import tools.emoji_model.vae as module

    calls = 0

    def failing(rgba: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return augmented(rgba, generator)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "augmented", failing)
        train_vae(folder, images, VAE)


def test_latent_statistics_are_those_of_the_images(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    module = AutoencoderKLQwenImage(**VAE_CONFIG)
    single_frame(module)
    vae = whole_vae(module)
    measure_latents(vae, images, batch=4)
    latents = vae.encode(on_white(images)[:, :, None]).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    normalised = (latents - mean) / std
    assert normalised.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-2
    torch.testing.assert_close(
        normalised.std(dim=(0, 2, 3, 4)), torch.ones(16), atol=1e-2, rtol=1e-2
    )


def test_kl_is_that_of_diffusers(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    module = AutoencoderKLQwenImage(**VAE_CONFIG)
    single_frame(module)
    pixels = on_white(images)[:, :, None]
    with torch.no_grad():
        _, _, kl = loss_parts(module, pixels, torch.zeros(6, 16, 1, 4, 4))
        posterior = whole_vae(module).encode(pixels).latent_dist
        log_variance, mean = posterior.logvar, posterior.mean
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)),
            torch.distributions.Normal(0.0, 1.0),
        ).mean()
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def cache() -> Cache:
    generator = torch.Generator().manual_seed(0)

    def group(rows: list[int], length: int) -> PromptGroup:
        masks = torch.arange(length) < torch.tensor([[length - 1]] * len(rows))
        return PromptGroup(
            torch.tensor(rows),
            torch.randn(len(rows), length, 128, generator=generator),
            masks,
            torch.randn(length, 128, generator=generator),
            torch.arange(length) < 3,
        )

    return Cache(
        torch.randn(6, 16, 4, 4, generator=generator), [group([0, 1, 2, 3], 5), group([4, 5], 8)]
    )


def test_transformer_training_continues_to_the_same_weights(tmp_path: Path, cache: Cache) -> None:
    whole = train_transformer(tmp_path / "whole", cache, TRANSFORMER)

    def stop(step: int, transformer: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_transformer(tmp_path / "parts", cache, TRANSFORMER, look=stop)
    parts = train_transformer(tmp_path / "parts", cache, TRANSFORMER)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_batch_depends_on_the_step_and_drops_prompts(cache: Cache) -> None:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(**CONFIG).eval()
    with torch.no_grad():
        first, again, other = (batch_loss(transformer, cache, TRANSFORMER, s) for s in (0, 0, 1))
        never = batch_loss(transformer, cache, replace(TRANSFORMER, dropout=0.0), 0)
        always = batch_loss(transformer, cache, replace(TRANSFORMER, dropout=1.0), 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(never, always)


def test_the_cache_holds_what_the_shards_hold(
    tmp_path: Path, tiny_model: Path, image_folder: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(["owl", "a very long name of a red emoji with many words"]):
        Image.new("RGB", (64, 64), (90 * number, 20, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(name)
    shards = tmp_path / "shards"
    data = DataConfig(img_dir=folder, img_size=[64])
    precompute(
        Settings(pretrained_model_name_or_path=str(tiny_model), data_config=data, shards_dir=shards)
    )
    cache = read_cache(shards, short=10)
    assert cache.latents.shape == (2, 16, 8, 8)
    short, long = cache.groups
    assert sorted([*short.rows.tolist(), *long.rows.tolist()]) == [0, 1]
    assert short.prompt_embeds.shape[1] == 10
    assert long.prompt_embeds.shape[1] == int(long.masks.sum()) > 10
    assert not short.prompt_embeds[0, int(short.masks.sum()) :].any()


def test_augmented_pictures_stay_in_range(images: torch.Tensor) -> None:
    for seed in range(4):
        pixels = augmented(images, torch.Generator().manual_seed(seed))
        assert pixels.shape == (6, 3, 32, 32)
        assert pixels.abs().max() <= 1
        assert torch.equal(pixels, augmented(images, torch.Generator().manual_seed(seed)))
    assert not torch.equal(pixels, on_white(images))


def test_images_are_read_in_name_order_without_colour_bleeding(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (128, 128), (255, 0, 0, 0))  # hidden red around a blue square
    rgba.paste((0, 0, 255, 255), (32, 32, 96, 96))
    rgba.save(tmp_path / "b.png")
    Image.new("RGBA", (64, 64), (10, 20, 30, 255)).save(tmp_path / "a.png")
    read = read_images(tmp_path, 64)
    assert read.shape == (2, 4, 64, 64)
    assert read[0, :, 0, 0].tolist() == [10, 20, 30, 255]
    white = on_white(read)[1]
    assert (white[0] <= white[2] + 0.02).all()  # nowhere redder than blue


def test_words_of_captions_are_single_tokens() -> None:
    tokenizer = build_tokenizer(["party popper", "owl"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("emoji, party popper").input_ids)
    assert tokens == ["emoji", ",", "Ġparty", "Ġpopper"]


def test_retrieval_ranks() -> None:
    pixels = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    emoji = Emoji(list("abcde"), pixels, torch.empty(0))
    drawn = torch.stack([pixels[1] + 0.1, torch.full((3, 4, 4), -0.4)])
    assert ranks_of_originals(drawn, [1, 4], emoji) == [0, 4]
