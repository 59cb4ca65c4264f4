"""Previews while training: which, when, and that training does not notice them."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from random_sets import MakeSettings, random_map, random_prompts, random_set

import qwen_lora.train.previews as previews_module
from qwen_lora.errors import InputError, QwenLoraError, Stopped
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.run import train
from qwen_lora.train.step import Stepper

PROMPTS = ["a red fox", 'ein "Fuchs" <b>&</b>', "a third one"]
FEW = {"preview_inference_steps": 2, "max_train_steps": 5, "checkpointing_steps": 2}


@pytest.fixture(scope="session")
def preview_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 samples with a map and three preview prompts; tests must not change it."""
    folder = tmp_path_factory.mktemp("previews") / "shards"
    return random_set(folder, 9, rgb=random_map(), prompts=random_prompts(PROMPTS))


@pytest.fixture(scope="session")
def mapped_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without prompts."""
    return random_set(tmp_path_factory.mktemp("previews") / "mapped", 9, rgb=random_map())


def drawn(run: Path) -> dict[str, bytes]:
    """Every picture of a run by its name."""
    folder = run / "previews"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_pictures_of_the_shards_prompts(make_settings: MakeSettings, preview_shards: Path) -> None:
    settings = make_settings(shards_dir=preview_shards, **FEW)
    train(settings)
    folder = settings.output_dir / "previews"
    steps = ["step-000000", "step-000002", "step-000004", "step-000005"]
    assert sorted(path.name for path in folder.iterdir()) == steps
    for name in steps:
        names = {path.name for path in (folder / name).iterdir()}
        assert names == {"000.png", "001.png", "002.png", "prompts.json"}
    facts = json.loads((folder / steps[2] / "prompts.json").read_text(encoding="utf-8"))
    assert facts == {
        "step": 4,
        "prompts": PROMPTS,
        "size": [32, 32],  # the most frequent bucket
        "inference_steps": 2,
        "guidance": 4.0,
        "seed": 0,
        "decoder": "linear map",
    }
    base, last = (pixels(folder / name / "000.png") for name in (steps[0], steps[-1]))
    assert base.shape == (32, 32, 3) and base.std() > 1
    assert (base != last).any()  # the LoRA shows
    assert (base != pixels(folder / steps[0] / "001.png")).any()


def test_training_is_the_same_with_and_without(
    make_settings: MakeSettings, preview_shards: Path
) -> None:
    common = {"shards_dir": preview_shards, "lora_dropout": 0.2, "gradient_checkpointing": True}
    without = train(make_settings("without", preview_steps=0, **{**FEW, **common}))
    with_ = train(make_settings("with", preview_steps=1, **{**FEW, **common}))
    assert not (without.lora.parent / "previews").exists()
    assert len(drawn(with_.lora.parent)) == 6 * len(PROMPTS)
    # The header names settings that change the result: previews are not among them.
    assert with_.lora.read_bytes() == without.lora.read_bytes()
    names = CheckpointStore(with_.lora.parent).path(5)
    for path in names.iterdir():
        other = CheckpointStore(without.lora.parent).path(5) / path.name
        assert path.read_bytes() == other.read_bytes()


def test_a_preview_is_what_the_pipeline_draws(
    make_settings: MakeSettings, preview_shards: Path, tiny_model: Path
) -> None:
    """Exact previews of the base against diffusers' pictures of the same embeddings."""
    settings = make_settings(
        shards_dir=preview_shards,
        pretrained_model_name_or_path=str(tiny_model),
        preview_vae=True,
        preview_size=[48, 64],
        preview_seed=7,
        **{**FEW, "max_train_steps": 1},
    )
    train(settings)
    pipeline = QwenImagePipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    with ShardSet.open(preview_shards) as shards:
        empty, prompts = shards.unconditional(), shards.preview_prompts()
    for number, prompt in enumerate(prompts):
        expected = pipeline(
            prompt_embeds=prompt.prompt_embeds.float()[None],
            prompt_embeds_mask=prompt.prompt_mask[None],
            negative_prompt_embeds=empty[0].float()[None],
            negative_prompt_embeds_mask=empty[1][None],
            true_cfg_scale=4.0,
            num_inference_steps=2,
            height=48,
            width=64,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]
        picture = pixels(settings.output_dir / "previews" / "step-000000" / f"{number:03d}.png")
        assert picture.shape == (48, 64, 3)
        assert np.abs(picture - np.asarray(expected).astype(int)).max() <= 1
    facts = settings.output_dir / "previews" / "step-000000" / "prompts.json"
    assert json.loads(facts.read_text(encoding="utf-8"))["decoder"] == "vae"


def test_captions_where_the_shards_have_no_prompts(
    make_settings: MakeSettings, mapped_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = make_settings("quiet", shards_dir=mapped_shards, **FEW)
    train(quiet)
    assert not (quiet.output_dir / "previews").exists()  # nobody asked
    asked = make_settings("asked", shards_dir=mapped_shards, preview_steps=5, **FEW)
    train(asked)
    said = capsys.readouterr().err
    assert "note: the shards hold no preview prompts: previews show 4 of their captions" in said
    assert "drawing 4 previews at step 0" in said
    facts = json.loads((asked.output_dir / "previews" / "step-000000" / "prompts.json").read_text())
    assert len(set(facts["prompts"])) == 4
    assert all(text.startswith(("picture ", "number ")) for text in facts["prompts"])
    assert [path.name for path in sorted((asked.output_dir / "previews").iterdir())] == [
        "step-000000",
        "step-000005",
    ]


def test_without_a_map_there_is_a_note(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(preview_steps=2, **FEW)
    train(settings)
    assert "note: no previews: the shards have no latent-to-RGB map" in capsys.readouterr().err
    assert not (settings.output_dir / "previews").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preview_vae": True}, "has no folder 'vae'"),
        ({"preview_size": [40, 64]}, r"preview_size \[40, 64\].*\[32, 64\] is the nearest"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_first_step(
    make_settings: MakeSettings, preview_shards: Path, changes: dict[str, Any], said: str
) -> None:
    settings = make_settings(shards_dir=preview_shards, **{**FEW, **changes})
    with pytest.raises(InputError, match=said):
        train(settings)
    assert not (settings.output_dir / "metrics.jsonl").exists()


def test_a_resumed_run_has_the_pictures_of_an_unbroken_one(
    make_settings: MakeSettings, preview_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 3, before its pictures; those of an abandoned continuation are left."""
    common = {**FEW, "shards_dir": preview_shards, "checkpointing_steps": 10, "preview_steps": 1}
    unbroken = train(make_settings("unbroken", **common))
    settings = make_settings("broken", **common)
    stop_after(monkeypatch, settings, 3)
    folder = settings.output_dir / "previews"
    assert sorted(path.name for path in folder.iterdir())[-1] == "step-000002"
    shutil.copytree(folder / "step-000002", folder / "step-000004")
    (folder / ".new-abc").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    train(settings)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert drawn(settings.output_dir) == drawn(unbroken.lora.parent)
    assert all(before[f"step-00000{step}"] == after[f"step-00000{step}"] for step in range(3))
    assert after["step-000004"] != before["step-000004"]
    assert ".new-abc" not in after

    train(make_settings("broken", preview_steps=0, **{k: common[k] for k in FEW}), restart=True)
    assert not folder.exists()


def stop_after(monkeypatch: pytest.MonkeyPatch, settings: Any, steps: int) -> None:
    original, done = Stepper.run, 0

    def run(self: Stepper, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Stepper, "run", run)
        train(settings)


def test_a_stop_while_drawing_saves_and_writes_no_half_step(
    make_settings: MakeSettings, preview_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(shards_dir=preview_shards, **FEW)
    original, pictures = previews_module.draw_latents, 0

    def draw(*arguments: Any) -> torch.Tensor:
        nonlocal pictures
        pictures += 1
        if pictures == len(PROMPTS) + 2:  # the second picture of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(previews_module, "draw_latents", draw)
        train(settings)
    assert CheckpointStore(settings.output_dir).steps() == [2]
    folder = settings.output_dir / "previews"
    assert [path.name for path in folder.iterdir()] == ["step-000000"]
    train(settings)  # the missing one is drawn at the start
    assert len(drawn(settings.output_dir)) == 4 * len(PROMPTS)


def test_a_full_disk_is_one_line(
    make_settings: MakeSettings, preview_shards: Path, tmp_path: Path
) -> None:
    settings = make_settings(shards_dir=preview_shards, **FEW)
    settings.output_dir.mkdir()
    (settings.output_dir / "previews").write_text("in the way")
    with pytest.raises(QwenLoraError, match="cannot write the previews of step 0"):
        train(settings)


def test_trackers_get_the_pictures(make_settings: MakeSettings, preview_shards: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = make_settings(shards_dir=preview_shards, report_to=["tensorboard"], **FEW)
    train(settings)
    events = b"".join(p.read_bytes() for p in settings.output_dir.rglob("events.out*"))
    assert events.count(b"previews") >= 4 and b"PNG" in events
