"""What all tests share: one thread, no network, a tiny model and a few captioned images."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_lora.tiny_model import write_tiny_model

torch.set_num_threads(1)
# Nothing that tests fetch or make stays on this machine.
os.environ["QWEN_LORA_CACHE"] = tempfile.mkdtemp(prefix="qwen-lora-cache-")
atexit.register(shutil.rmtree, os.environ["QWEN_LORA_CACHE"], ignore_errors=True)

FAULT_SEED = pytest.StashKey[int]()
IMAGE_SIZES = [(96, 96), (64, 128), (128, 64), (160, 96)]  # [height, width]
IMAGE_COLORS = ["red", "green", "blue"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-seed", type=int, help="replay the random choices of fault tests")


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--fault-seed")
    of_session = getattr(config, "workerinput", {}).get("fault_seed")  # with --numprocesses
    if seed is None:
        seed = random.randrange(1 << 32) if of_session is None else of_session
    config.stash[FAULT_SEED] = seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Every worker of a session draws the same."""
    node.workerinput["fault_seed"] = node.config.stash[FAULT_SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"fault seed: {config.stash[FAULT_SEED]} (--fault-seed replays it)"


@pytest.fixture
def fault_seed(request: pytest.FixtureRequest) -> int:
    """A new number each session, printed at its start and with every failure."""
    seed = request.config.stash[FAULT_SEED]
    print(f"replay: pytest '{request.node.nodeid}' --fault-seed {seed}")
    return seed


@pytest.fixture(scope="session")
def rank_server() -> Iterator[Any]:
    """A process that has imported everything, from which tests fork the ranks of a run."""
    from tests.faults.rank_runs import RankServer

    started = RankServer()
    yield started
    started.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline folder, written once; tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def transformer_only(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without its VAE, text encoder and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "transformer-only"
    for name in ("transformer", "scheduler"):
        shutil.copytree(tiny_model / name, folder / name)
    shutil.copy(tiny_model / "model_index.json", folder)
    return folder


@pytest.fixture(scope="session")
def deep_model(transformer_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`transformer_only` with four blocks; tests must not change it."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("models") / "deep"
    shutil.copytree(transformer_only, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    shutil.rmtree(folder / "transformer")
    named = {k: v for k, v in config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    made = QwenImageTransformer2DModel(**{**named, "num_layers": 4})
    made.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 captioned PNGs of 4 sizes and 3 colours; tests must not change it."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(12):
        height, width = IMAGE_SIZES[index % len(IMAGE_SIZES)]
        channel = index % len(IMAGE_COLORS)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., channel] = np.linspace(60, 250, width, dtype=np.uint8)
        top, left = (int(value) for value in rng.integers(8, 32, size=2))
        pixels[top : top + 24, left : left + 24] = rng.integers(0, 256, size=3)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        caption = f"a {IMAGE_COLORS[channel]} picture with a small square, number {index}"
        (folder / f"{index:02d}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder
