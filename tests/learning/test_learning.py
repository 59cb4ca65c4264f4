"""What each setting of a LoRA does, on a model that draws: held-out pictures, fixed noise."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.demo.run import GUIDANCE, MODEL, SIDE, prompt
from qwen_lora.errors import Stopped
from qwen_lora.models import resolve_model
from qwen_lora.sample import COMPONENTS, SampleRequest, load_pipeline, sample_images
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.objective import flow_matching_loss
from qwen_lora.train.run import train
from tests.learning.conftest import PREVIEWED, STEPS, Learn, Run

REQUEST = SampleRequest(
    prompts=[prompt(PREVIEWED)],
    seeds=[0],
    steps=8,
    true_cfg_scale=GUIDANCE,
    height=SIDE,
    width=SIDE,
)


# The figures in comments are what was found on a CPU; the bounds leave room for other machines.


def test_a_lora_beats_the_base_on_held_out_pictures(learn: Learn) -> None:
    assert learn().gain >= 0.6  # 0.81: from 4.82 to 0.93


def test_attention_alone_fits_less_than_all_linear(learn: Learn) -> None:
    attention, all_linear = learn(lora_targets="attention"), learn()
    assert attention.gain >= 0.5  # 0.80
    assert attention.train_loss > 1.1 * all_linear.train_loss  # 0.99 and 0.78


@pytest.mark.slow
def test_a_higher_rank_fits_the_training_pictures_better(learn: Learn) -> None:
    low, usual, high = learn(rank=1), learn(), learn(rank=64)
    assert high.train_loss < usual.train_loss < 0.85 * low.train_loss  # 0.68, 0.78, 1.16


@pytest.mark.slow
def test_alpha_scales_what_a_step_does(learn: Learn) -> None:
    weak, usual = learn(lora_alpha=1), learn()  # the usual alpha is the rank, 16
    assert 0.1 < weak.gain < 0.75 * usual.gain  # 0.47 and 0.81


@pytest.mark.slow
def test_a_lower_learning_rate_moves_less(learn: Learn) -> None:
    tiny, low, usual = (learn(learning_rate=rate).gain for rate in (1e-6, 1e-4, 1e-3))
    assert abs(tiny) < 0.02  # 0.001
    assert tiny + 0.05 < low < usual - 0.2  # 0.19, 0.81


@pytest.mark.slow
def test_a_learning_rate_far_too_high_learns_less(learn: Learn) -> None:
    assert learn(learning_rate=0.1).gain < learn().gain - 0.1  # 0.59


def empty_prompt_loss(run: Run | None, style_shards: Path) -> float:
    """The mean loss over all pictures without a prompt, at fixed noise."""
    pipeline = load_pipeline(
        resolve_model(str(MODEL), COMPONENTS), [run.lora] if run else [], dtype="float32"
    )
    generator = torch.Generator().manual_seed(0)
    with ShardSet.open(style_shards) as shards, torch.no_grad():
        count = len(shards.table.sample_id)
        latents = torch.stack([shards.read(r).tensors["latents"].float() for r in range(count)])
        embeds, mask = shards.unconditional()
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = torch.linspace(0.1, 0.9, count)
        losses = flow_matching_loss(
            pipeline.transformer, latents, [embeds] * count, [mask] * count, noise, sigmas
        )
    return losses.mean().item()


def test_caption_dropout_keeps_the_model_usable_without_a_prompt(
    learn: Learn, style_shards: Path
) -> None:
    """Guidance needs the prediction for the empty prompt. Without dropout a LoRA forgets it."""
    base = empty_prompt_loss(None, style_shards)  # 0.65
    never, often = (
        empty_prompt_loss(learn(data_config=DataConfig(caption_dropout_rate=rate)), style_shards)
        for rate in (0.0, 0.5)
    )
    assert never > 1.2 * base  # 0.99
    assert often < 0.8 * never  # 0.66


def test_a_stopped_run_continues_to_the_same_picture(
    learn: Learn, style_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn()
    stopped = tmp_path / "stopped"
    settings = {
        "pretrained_model_name_or_path": str(MODEL),
        "shards_dir": style_shards,
        "output_dir": stopped,
        "train_batch_size": 8,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "lora_targets": "all-linear",
        "gradient_checkpointing": False,
        "validation_fraction": 0.25,
        "validation_steps": STEPS,
        "checkpointing_steps": STEPS // 3,
        "logging_steps": 20,
        "preview_steps": 0,
    }
    from qwen_lora.train.loop import Loop

    saving = Loop._save_when_due

    def stop_after_saving(loop: Loop) -> None:
        saving(loop)
        if loop.state.step == STEPS // 3:
            raise Stopped(15, "stopped for the test")

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Loop, "_save_when_due", stop_after_saving)
        train(Settings(**settings))
    result = train(Settings(**settings))
    assert result.resumed_from == STEPS // 3
    expected, found = load_file(whole.lora), load_file(result.lora)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert np.array_equal(drawn(whole.lora), drawn(result.lora))


def test_the_exported_file_draws_what_training_showed(learn: Learn, tmp_path: Path) -> None:
    """The last preview, drawn by the trainer and decoded by the VAE, is the picture that diffusers'
    pipeline draws from the exported file."""
    run = learn(
        preview_steps=STEPS,
        preview_vae=True,
        preview_guidance=GUIDANCE,
        preview_inference_steps=REQUEST.steps,
    )
    shown = np.asarray(Image.open(run.path / "previews" / f"step-{STEPS:06d}" / "000.png"))
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(run.lora, moved)
    picture = drawn(moved)
    assert shown.shape == picture.shape == (SIDE, SIDE, 3)
    difference = np.abs(shown.astype(int) - picture.astype(int))
    assert difference.max() <= 6  # 3: the shards keep embeddings in bfloat16, the pipeline float32
    assert difference.mean() < 0.5
    base = np.asarray(sample_images(pipeline_with(moved), REQUEST)[0].base)
    assert np.abs(base.astype(int) - picture.astype(int)).mean() > 2


def pipeline_with(lora: Path) -> object:
    return load_pipeline(resolve_model(str(MODEL), COMPONENTS), [lora], dtype="float32")


def drawn(lora: Path) -> np.ndarray:
    """[SIDE, SIDE, 3] uint8, by diffusers' pipeline."""
    return np.asarray(sample_images(pipeline_with(lora), REQUEST, base=False)[0].lora)
