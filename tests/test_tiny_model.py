"""The tiny model is a whole pipeline that plain diffusers loads and runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from qwen_lora.errors import InputError
from qwen_lora.hashing import sha256_file
from qwen_lora.models import resolve_model
from qwen_lora.tiny_model import write_tiny_model
from qwen_lora.tiny_model.images import synthetic_images
from qwen_lora.tiny_model.tokenizer import make_tokenizer

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "second"
    torch.manual_seed(123)  # must not matter
    write_tiny_model(folder)
    return folder


def test_plain_diffusers_loads_and_runs_it(tiny_model: Path) -> None:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model))
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompt=prompt,
            negative_prompt=" ",
            true_cfg_scale=4.0,
            height=64,
            width=96,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for prompt in ("a red owl", "a blue bicycle")
    ]
    assert images[0].shape == (1, 3, 64, 96)
    assert images[0].isfinite().all() and images[0].std() > 0.01
    assert not torch.equal(images[0], images[1])  # the prompt matters


def test_it_is_complete_and_small(tiny_model: Path) -> None:
    assert {path.name for path in tiny_model.iterdir()} == {*COMPONENTS, "model_index.json"}
    assert sum(path.stat().st_size for path in tiny_model.rglob("*") if path.is_file()) < 10e6


def test_equal_seeds_give_equal_files(tiny_model: Path, second: Path) -> None:
    files = sorted(path.relative_to(tiny_model) for path in tiny_model.rglob("*.*"))
    assert len(files) >= 9
    for name in files:
        assert sha256_file(tiny_model / name) == sha256_file(second / name), name


def test_another_seed_gives_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    write_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for component in ("text_encoder", "transformer", "vae"):
        (weights,) = (tiny_model / component).glob("*.safetensors")
        assert sha256_file(weights) != sha256_file(tmp_path / "other" / component / weights.name)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        write_tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_template_prefix_is_34_tokens(tiny_model: Path) -> None:
    from diffusers import QwenImagePipeline
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(str(tiny_model / "tokenizer"))
    pipeline = QwenImagePipeline(None, None, None, tokenizer, None)
    prefix, suffix = pipeline.prompt_template_encode.split("{}")
    assert len(tokenizer(prefix).input_ids) == 34
    assert len(tokenizer(suffix).input_ids) == 5
    assert tokenizer.decode(tokenizer(prefix).input_ids) == prefix


def test_tokenizer_behaves_like_qwen2() -> None:
    tokenizer = make_tokenizer()
    # One token a digit, a line-break pair is one token, decomposed letters are composed first.
    assert tokenizer.tokenize("12\n\na") == ["1", "2", "ĊĊ", "a"]
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids
    assert len(tokenizer("<|im_start|><|image_pad|><|endoftext|><tool_call>").input_ids) == 4
    text = "Ein Übermut — 猫🦉\tx"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_vision_tokens_of_the_config_exist(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "text_encoder/config.json").read_text())
    tokenizer = make_tokenizer()
    for key, token in {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }.items():
        assert config[key] == tokenizer.convert_tokens_to_ids(token) < len(tokenizer)


def test_scheduler_config_is_qwen_images(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "scheduler/scheduler_config.json").read_text())
    assert config["use_dynamic_shifting"] and config["time_shift_type"] == "exponential"
    assert (config["base_shift"], config["max_shift"]) == (0.5, 0.9)
    assert (config["base_image_seq_len"], config["max_image_seq_len"]) == (256, 8192)
    assert config["shift_terminal"] == 0.02


def test_normalised_latents_of_unseen_images_have_unit_variance(tiny_model: Path) -> None:
    model = resolve_model(str(tiny_model), ["vae"])
    encoder = model.family.load_latent_encoder(model, device=CPU, dtype=torch.float32)
    # Other images and another size than the statistics were measured on.
    latents = encoder.encode(synthetic_images(48, 96, 64, seed=1000)).mean  # [N, C, h, w]
    per_channel = latents.transpose(0, 1).flatten(1)
    assert per_channel.mean(dim=1).abs().max() < 0.35
    assert (per_channel.std(dim=1) - 1).abs().max() < 0.25
    assert abs(latents.std().item() - 1) < 0.1


def test_transformer_alone_resolves(transformer_only: Path) -> None:
    model = resolve_model(str(transformer_only), ["transformer", "scheduler"])
    assert model.family.name == "qwen-image"
    shutil.copytree(transformer_only, transformer_only.with_name("no-index"))
    (transformer_only.with_name("no-index") / "model_index.json").unlink()
    bare = resolve_model(str(transformer_only.with_name("no-index")), ["transformer"])
    assert bare.family.name == "qwen-image"
