"""Preview prompts: encoded as the pipeline does, once, by the text encoder alone."""

import os
import signal

import pytest
import torch

from qwen_lora.errors import InputError, QwenLoraError, Stopped
from qwen_lora.families.qwen_image import QwenImage
from qwen_lora.families.qwen_image.text import QwenPromptEncoder
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify

PROMPTS = ["a red fox, sitting in the snow", "blue", "a \u732b <|im_end|> that is only text"]


def stored(settings) -> list:
    with ShardSet.open(settings.shards_dir) as shards:
        return shards.preview_prompts()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoders are loaded, in their order."""
    names: list[str] = []

    def note(name: str, method: str) -> None:
        original = getattr(QwenImage, method)

        def load(self, *args, **kwargs):
            names.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(QwenImage, method, load)

    note("text", "load_prompt_encoder")
    note("vae", "load_latent_encoder")
    return names


def test_embeddings_are_the_pipelines(make_settings, tiny_model) -> None:
    from diffusers import QwenImagePipeline

    prompts = PROMPTS[:2]  # the third the pipeline would obey
    settings = make_settings(text_encoder_dtype="float32", preview_prompts=prompts)
    precompute(settings)
    pipe = QwenImagePipeline.from_pretrained(str(tiny_model), vae=None, transformer=None)
    for prompt, made in zip(prompts, stored(settings), strict=True):
        with torch.no_grad():
            expected = pipe.encode_prompt(prompt)[0][0]
        assert made.prompt == prompt
        assert made.prompt_embeds.dtype == torch.bfloat16
        assert made.prompt_embeds.shape == expected.shape
        error = (made.prompt_embeds.float() - expected).abs()
        assert (error <= expected.abs() * 2**-8 + 1e-5).all()
        assert made.prompt_mask.shape == expected.shape[:1] and made.prompt_mask.all()
    assert verify(settings.shards_dir, deep=True).ok


def test_the_same_prompts_again_load_nothing(make_settings, published, no_encoders) -> None:
    settings = make_settings(preview_prompts=PROMPTS)
    precompute(settings)
    before = published(settings.shards_dir)
    no_encoders()
    assert precompute(settings).unchanged == 12
    assert published(settings.shards_dir) == before


def test_other_prompts_load_the_text_encoder_alone(make_settings, published, loads) -> None:
    precompute(make_settings())
    first, name = load_manifest(make_settings().shards_dir)
    assert first.previews is None and loads == ["vae", "text"]
    loads.clear()
    settings = make_settings(preview_prompts=PROMPTS)
    assert precompute(settings).unchanged == 12
    assert loads == ["text"]
    second, _ = load_manifest(settings.shards_dir)
    assert second.previous == name and second.shards == first.shards
    assert [each.prompt for each in stored(settings)] == PROMPTS

    files = published(settings.shards_dir)
    loads.clear()
    precompute(make_settings())  # none asked for: those that are there stay
    assert published(settings.shards_dir) == files and loads == []
    precompute(make_settings(preview_prompts=PROMPTS[1:]))
    assert [each.prompt for each in stored(settings)] == PROMPTS[1:] and loads == ["text"]
    assert files.items() - {("manifest.json", files["manifest.json"])} <= (
        published(settings.shards_dir).items()
    )
    assert verify(settings.shards_dir, deep=True).ok


@pytest.mark.parametrize("placement", ["sequential", "offload"])
def test_placement_changes_no_byte_and_loads_no_more(
    make_settings, tmp_path, placement, published, loads
) -> None:
    folders = [tmp_path / "together", tmp_path / "other"]
    for folder, each in zip(folders, ["together", placement], strict=True):
        precompute(
            make_settings(shards_dir=folder, encoder_placement=each, preview_prompts=PROMPTS)
        )
    assert sorted(loads) == ["text", "text", "vae", "vae"]
    assert published(folders[1]) == published(folders[0])
    assert load_manifest(folders[0])[0].previews is not None


def test_prompts_are_encoded_in_batches_of_their_own(make_settings, monkeypatch) -> None:
    encode, batches = QwenPromptEncoder.encode, []

    def note(self, captions):
        batches.append(list(captions))
        return encode(self, captions)

    monkeypatch.setattr(QwenPromptEncoder, "encode", note)
    prompts = [f"picture {number}" for number in range(4)]
    precompute(make_settings(preview_prompts=prompts))
    own = [batch for batch in batches if set(batch) & set(prompts)]
    assert sorted(map(len, own)) == [1, 3]  # text_batch_size is 3
    assert sorted(sum(own, [])) == prompts


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_prompt_beyond_the_limit_is_refused_first(make_settings, no_encoders, dry_run) -> None:
    settings = make_settings(preview_prompts=["short", "word " * 1100])
    no_encoders()
    with pytest.raises(InputError, match=r"preview_prompts: entry 2 has \d{4} tokens .* 1024"):
        precompute(settings, dry_run=dry_run)
    assert not list(settings.shards_dir.glob("shard-*"))


def test_a_dry_run_says_what_is_to_be_done(make_settings, capsys, no_encoders) -> None:
    settings = make_settings(preview_prompts=PROMPTS)
    precompute(settings, dry_run=True)
    told = capsys.readouterr().out
    assert "3 preview prompts to encode" in told
    assert "latent-to-RGB map for previews to be fitted to 12 samples" in told
    assert not settings.shards_dir.exists()
    precompute(settings)
    capsys.readouterr()
    no_encoders()
    precompute(settings, dry_run=True)
    told = capsys.readouterr().out
    assert "3 preview prompts, in the set already" in told and "to be fitted" not in told


def test_an_embedding_that_is_not_finite_is_named(make_settings, monkeypatch) -> None:
    encode = QwenPromptEncoder.encode

    def spoil(self, captions):
        encoded = encode(self, captions)
        for caption, result in zip(captions, encoded, strict=True):
            if caption == "blue":
                result.prompt_embeds[0, 0] = float("inf")
        return encoded

    monkeypatch.setattr(QwenPromptEncoder, "encode", spoil)
    with pytest.raises(QwenLoraError, match="the preview prompt 'blue' is not finite"):
        precompute(make_settings(preview_prompts=PROMPTS))
    assert precompute(make_settings(preview_prompts=PROMPTS[:1])).written == 12


@pytest.mark.parametrize("fresh", [True, False])
def test_a_signal_at_the_prompts_costs_no_byte(
    make_settings, tmp_path, published, monkeypatch, fresh
) -> None:
    def settings(name: str, prompts: list[str]):
        return make_settings(shards_dir=tmp_path / name, preview_prompts=prompts)

    if not fresh:
        for name in ("unbroken", "broken"):
            precompute(settings(name, []))
    precompute(settings("unbroken", PROMPTS))
    encode = QwenPromptEncoder.encode

    def stop(self, captions):
        if "blue" in captions:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, captions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwenPromptEncoder, "encode", stop)
        with pytest.raises(Stopped):
            precompute(settings("broken", PROMPTS))
    assert not list((tmp_path / "broken").glob("previews-*"))
    precompute(settings("broken", PROMPTS))
    assert published(tmp_path / "broken") == published(tmp_path / "unbroken")
