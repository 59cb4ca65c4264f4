"""The demo: its numbers, its names, and a short run of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_lora.demo import run as demo
from qwen_lora.demo import style
from qwen_lora.sample import Pictures


def flat(value: int) -> style.Picture:
    """A grey square on white."""
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[4:28, 4:28] = value
    return picture


def shaded() -> style.Picture:
    """The same square with 4/255 from row to row."""
    picture = flat(0)
    picture[4:28, 4:28] = (100 + 4 * np.arange(24))[:, None, None]
    return picture


def test_shading_tells_gradients_from_flat_areas() -> None:
    assert style.shading(flat(120)) == 0
    assert style.shading(shaded()) > 0.9
    assert style.shading(np.full((8, 8, 3), 255, np.uint8)) == 0
    assert style.mean_shading([flat(120), shaded()]) == style.shading(shaded()) / 2


def test_noise_and_edges_are_not_shading() -> None:
    noise = np.random.default_rng(0).integers(0, 200, (32, 32, 3)).astype(np.uint8)
    assert style.shading(noise) < 0.1


def test_distance_is_of_the_whole_range() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert style.distance([black], [white]) == 1
    assert style.distance([black, white], [black, black]) == 0.5


def test_same_content_needs_the_own_counterpart_to_be_nearest() -> None:
    pictures = [flat(0), flat(100), flat(200)]
    near = [flat(10), flat(90), flat(210)]
    assert style.same_content(near, pictures) == 1
    assert style.same_content([near[1], near[0], near[2]], pictures) == pytest.approx(1 / 3)


def test_unseen_names_are_not_among_the_training_images() -> None:
    unseen = demo.read_unseen()
    trained = {file.read_text().strip() for file in demo.IMAGES.glob("*.txt")}
    assert len(trained) == 64
    assert not trained & {item.name for item in unseen}
    assert [item.original is None for item in unseen] == [False] * 24 + [True] * 8
    assert all(item.original.size == (demo.SIDE, demo.SIDE) for item in unseen if item.original)


def test_measure_compares_with_the_originals_where_there_are_some() -> None:
    unseen = [
        demo.Unseen("a", Image.fromarray(shaded())),
        demo.Unseen("b", None),
    ]
    pictures = [
        Pictures("a", 0, Image.fromarray(flat(120)), Image.fromarray(shaded())),
        Pictures("b", 0, Image.fromarray(flat(30)), Image.fromarray(flat(40))),
    ]
    numbers = demo.measure(unseen, pictures)
    assert numbers["shading_base"] == 0
    assert numbers["shading_lora"] == numbers["shading_originals"] > 0.9
    assert numbers["distance_lora"] == 0 < numbers["distance_base"]
    assert numbers["shading_food_lora"] == 0
    assert len(demo.summary(numbers)) == 4
    assert demo.draw_grid(unseen, pictures).width > 3 * 2 * demo.SIDE


def test_a_short_demo_writes_everything_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, unseen = demo.demo_settings, demo.read_unseen()[22:26]
    short = {"max_train_steps": 4, "train_batch_size": 4, "validation_max_images": 2}
    quick = {"preview_inference_steps": 2, "encode_threads": 1, "rank": 2}
    monkeypatch.setattr(
        demo, "demo_settings", lambda *a: settings(*a).model_copy(update={**short, **quick})
    )
    monkeypatch.setattr(demo, "read_unseen", lambda: unseen)
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
    demo.run(tmp_path)
    assert (tmp_path / "run" / "lora.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    with Image.open(tmp_path / "before-after.png") as picture:
        assert picture.width > 1000
    numbers = json.loads((tmp_path / "style.json").read_text())
    printed = capsys.readouterr().out
    assert f"{numbers['shading_base']:.3f} base -> {numbers['shading_lora']:.3f} LoRA" in printed
    demo.run(tmp_path)  # finds everything done
    assert json.loads((tmp_path / "style.json").read_text()) == numbers
