"""Sampling equals diffusers' own calls; files that cannot work are refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_lora.errors import InputError
from qwen_lora.grid import Row, labelled_grid
from qwen_lora.models import resolve_model
from qwen_lora.sample import SampleRequest, load_pipeline, sample, sample_images

PROMPT = "a red boat"
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def lora_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with an effect, written by diffusers itself."""
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    torch.manual_seed(0)
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    folder = tmp_path_factory.mktemp("lora")
    state = {name: 3 * value for name, value in get_peft_model_state_dict(transformer).items()}
    QwenImagePipeline.save_lora_weights(folder, state, weight_name="boat.safetensors")
    return folder / "boat.safetensors"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return pixels(image)


def test_pictures_equal_diffusers_own_calls(tiny_model: Path, lora_file: Path) -> None:
    request = SampleRequest([PROMPT, "a longer prompt about a green hill"], [3], steps=2, **SIZE)
    pipeline = load_pipeline(resolve_model(str(tiny_model), ["transformer"]), [lora_file])
    drawn = sample_images(pipeline, request)

    plain = QwenImagePipeline.from_pretrained(tiny_model)
    plain.set_progress_bar_config(disable=True)

    def reference(prompt: str) -> Image.Image:
        return plain(
            prompt=prompt,
            negative_prompt=" ",
            true_cfg_scale=4.0,
            num_inference_steps=2,
            generator=torch.Generator("cpu").manual_seed(3),
            max_sequence_length=1024,
            **SIZE,
        ).images[0]

    base = [reference(prompt) for prompt in request.prompts]
    plain.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
    adapted = [reference(prompt) for prompt in request.prompts]
    assert [(p.prompt, p.seed) for p in drawn] == [(prompt, 3) for prompt in request.prompts]
    for picture, one, other in zip(drawn, base, adapted, strict=True):
        assert picture.base is not None and picture.lora is not None
        np.testing.assert_array_equal(pixels(picture.base), pixels(one))
        np.testing.assert_array_equal(pixels(picture.lora), pixels(other))
        assert (pixels(one) != pixels(other)).any()


def test_grid_and_single_pictures(tiny_model: Path, lora_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "grid.png"
    arguments = {"steps": 2, "true_cfg_scale": 1.0, "save_images": True, **SIZE}
    result = sample(str(tiny_model), [lora_file], [PROMPT], [0, 1], output, **arguments)
    assert result == output
    names = sorted(path.name for path in output.parent.iterdir())
    singles = [f"grid-00{i}-seed{i}-{kind}.png" for i in (0, 1) for kind in ("base", "lora")]
    assert names == sorted(["grid.png", *singles])
    grid = read(output)
    left = read(output.with_name(singles[0]))
    right = read(output.with_name(singles[1]))
    assert contains(grid, left) and contains(grid, right)

    alone = tmp_path / "alone.png"
    sample(str(tiny_model), [lora_file], [PROMPT], [0], alone, base=False, lora_scale=0.0, **SIZE,
           steps=2, true_cfg_scale=1.0)  # fmt: skip
    assert contains(read(alone), left)  # at scale 0 the LoRA does nothing
    assert not contains(read(alone), right)


def contains(grid: np.ndarray, cell: np.ndarray) -> bool:
    height, width, _ = cell.shape
    windows = np.lib.stride_tricks.sliding_window_view(grid, (height, width), axis=(0, 1))
    firsts = np.argwhere((windows[..., 0, 0] == cell[0, 0]).all(axis=-1))
    return any((grid[y : y + height, x : x + width] == cell).all() for y, x in firsts)


def test_a_run_folder_stands_for_its_lora(
    tiny_model: Path, lora_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "lora.safetensors").write_bytes(lora_file.read_bytes())
    output = tmp_path / "x.jpg"
    sample(str(tiny_model), [run, lora_file], [PROMPT], [0], output, steps=2, **SIZE)
    with Image.open(output) as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize("kind", ["absent", "text", "not a lora", "elsewhere", "other shapes"])
def test_a_bad_lora_is_one_clear_line(
    kind: str, tiny_model: Path, lora_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    tensors = load_file(lora_file)
    if kind == "text":
        bad.write_text("hello")
    elif kind == "not a lora":
        save_file({"transformer.weight": torch.zeros(2)}, bad)
    elif kind == "elsewhere":
        save_file({f"unet.{n}": t for n, t in tensors.items()}, bad)
    elif kind == "other shapes":
        wider = {n: t.repeat(1, 2) if "lora_A" in n else t.repeat(2, 1) for n, t in tensors.items()}
        save_file(wider, bad)
    output = tmp_path / "x.png"
    with pytest.raises(InputError, match="LoRA|safetensors") as caught:
        sample(str(tiny_model), [bad], [PROMPT], [0], output, steps=2, **SIZE)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 100}, "multiple of 16"),
        ({"output": Path("x.txt")}, "must end in"),
        ({"prompts": []}, "give a prompt"),
        ({"seeds": []}, "give a seed"),
        ({"steps": 1}, "steps"),
        ({"base": False}, "nothing to draw"),
        ({"model": "no/such/folder/here"}, "model"),
    ],
)
def test_requests_that_cannot_work(change: dict, message: str, tiny_model: Path) -> None:
    arguments = {
        "model": str(tiny_model),
        "loras": [],
        "prompts": [PROMPT],
        "seeds": [0],
        "output": Path("never.png"),
        **change,
    }
    with pytest.raises(InputError, match=message):
        sample(**arguments)
    assert not Path("never.png").exists()


def test_large_grids_stay_pictures_and_labels_never_fail() -> None:
    image = Image.new("RGB", (1024, 1024), "red")
    caption = "日本語 und ein sehr langer Text " * 40
    grid = labelled_grid(["base", "x" * 300], [Row(caption, [image, image])] * 12)
    assert max(grid.size) < 8192 * 1.5
    assert grid.getpixel((40, 400)) == (255, 0, 0)


def test_loras_of_several_runs_are_told_apart() -> None:
    from qwen_lora.sample import _name

    assert _name(Path("style/lora.safetensors")) == "style"
    assert _name(Path("style/ghibli.safetensors")) == "ghibli"


def test_a_transformer_from_a_single_file(tiny_model: Path, tmp_path: Path) -> None:
    """The same picture as with the folder's own weights; another one with others."""
    from safetensors.torch import load_file, save_file

    (own,) = (tiny_model / "transformer").glob("*.safetensors")
    weights = load_file(own)
    file = tmp_path / "one.safetensors"
    pictures = []
    for changed in (None, 1.0, 0.5):
        if changed is not None:
            save_file({"model.diffusion_model." + n: t * changed for n, t in weights.items()}, file)
        output = tmp_path / f"{changed}.png"
        sample(str(tiny_model), [], [PROMPT], [0], output, steps=2, true_cfg_scale=1.0, **SIZE,
               transformer_file=file if changed else None)  # fmt: skip
        pictures.append(read(output))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()
