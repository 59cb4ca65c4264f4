"""`shards preview` on sets that precompute made: pictures, page, and what must not be in them."""

from __future__ import annotations

import base64
import getpass
import io
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.merge import merge
from qwen_lora.shards.preview import choose, preview
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.writer import publish_manifest

HOSTILE = '<img src=x onerror="alert(1)"> & <script>alert(2)</script> "quoted" \u202egnp.exe'


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[np.ndarray]:
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, data = (attributes["src"] or "").partition(";base64,")
                assert kind == "data:image/webp"
                with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                    found.append(np.asarray(picture.convert("RGB"), np.float64))
        return found


@pytest.fixture
def made(make_settings: Callable[..., Settings], dataset: Path, tmp_path: Path) -> Path:
    """Four images of several buckets, one with a caption that would like to be markup."""
    first = sorted(dataset.glob("*.txt"))[0]
    first.write_text(HOSTILE, encoding="utf-8")
    precompute(make_settings(data={"img_dir": dataset}))
    return tmp_path / "shards"


def test_a_page_and_a_sheet_without_a_model(made: Path, tmp_path: Path) -> None:
    report = preview(made, tmp_path / "out")
    assert (report.shown, report.samples) == (4, 4)
    text = report.page.read_text(encoding="utf-8")
    page = Page(text)
    with ShardSet.open(made) as shards:
        rgb = shards.rgb_map()
        assert rgb is not None
        drawn = []
        for row in choose(shards.table, 48):
            record = shards.read(row)
            assert shards.table.sample_id[row] in page.text
            height, width = record.meta.bucket
            assert f"{height} × {width} px" in page.text
            drawn.append(rgb.apply(record.tensors["latents"].float().numpy()))
            if record.meta.captions != [HOSTILE]:
                assert record.meta.captions and record.meta.captions[0] in page.text
    shown = page.pictures()
    assert [one.shape for one in shown] == [one.shape for one in drawn]
    for one, expected in zip(shown, drawn, strict=True):
        assert np.abs(one - expected).mean() < 12  # WebP
    with Image.open(report.sheet) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size[0] > 224


def test_nothing_of_a_caption_is_markup_and_nothing_is_loaded(made: Path, tmp_path: Path) -> None:
    report = preview(made, tmp_path / "out")
    text = report.page.read_text(encoding="utf-8")
    page = Page(text)
    assert HOSTILE.replace("\u202e", "\\u202e") in page.text
    assert "\u202e" not in text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "a", "form", "base"}
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") and tag == "meta"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert set(attributes) <= {
            *("lang", "charset", "http-equiv", "content", "name", "class", "src", "width"),
            *("height", "alt", "dir"),
        }, tag
    assert not re.search(r"url\(|@import|https?:", text)


def test_no_path_or_name_of_this_machine(made: Path, tmp_path: Path) -> None:
    report = preview(made, tmp_path / "out")
    head = report.page.read_text(encoding="utf-8").partition('<ul class="samples">')[0]
    head = re.sub("<style>.*</style>", "", head, flags=re.DOTALL)
    for data in (report.page.read_bytes(), report.sheet.read_bytes()):
        assert str(tmp_path).encode() not in data
    for name in (made.name, tmp_path.name, getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(name)}\b", head), name
    with Image.open(report.sheet) as sheet:
        assert sheet.info.keys() <= {"dpi"}


def test_a_vae_draws_what_diffusers_decodes(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    report = preview(made, tmp_path / "exact.html", vae=str(tiny_model))
    assert report.page == tmp_path / "exact.html"
    vae = AutoencoderKLQwenImage.from_pretrained(tiny_model / "vae", torch_dtype=torch.float32)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    shown = Page(report.page.read_text(encoding="utf-8")).pictures()
    with ShardSet.open(made) as shards, torch.no_grad():
        for row, one in zip(choose(shards.table, 48), shown, strict=True):
            latents = shards.read(row).tensors["latents"].float()[None, :, None]
            pixels = vae.decode(latents * std + mean).sample[0, :, 0]  # [3, H, W]
            expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
            assert one.shape == expected.shape
            assert np.abs(one - expected).mean() < 12  # WebP


def test_another_vae_is_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_lora.tiny_model import write_tiny_model

    write_tiny_model(tmp_path / "other", seed=5)
    preview(made, tmp_path / "out", vae=str(tmp_path / "other"))
    assert "is in other files than the one that made the set" in capsys.readouterr().err


def test_samples_come_from_all_buckets(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    precompute(make_settings())
    with ShardSet.open(tmp_path / "shards") as shards:
        table = shards.table
        buckets = {tuple(bucket) for bucket in table.bucket.tolist()}
        assert 1 < len(buckets) < len(table) == 12
        some = choose(table, len(buckets))
        assert {tuple(table.bucket[row].tolist()) for row in some} == buckets
        assert sorted(choose(table, 99)) == sorted(choose(table, 99, seed=1)) == list(range(12))
        assert len({tuple(choose(table, 4, seed=seed)) for seed in range(20)}) > 1
        assert choose(table, 5, seed=3) == choose(table, 5, seed=3)
    assert preview(tmp_path / "shards", tmp_path / "out", count=2).shown == 2
    for count in (0, 1001):
        with pytest.raises(InputError, match="from 1 to 1000"):
            preview(tmp_path / "shards", tmp_path / "out", count=count)


def test_a_set_without_texts_or_map(made: Path, tmp_path: Path) -> None:
    merge([made], tmp_path / "bare", ["captions", "source"])
    page = preview(tmp_path / "bare", tmp_path / "out").page.read_text(encoding="utf-8")
    assert page.count("(no captions stored)") == 8  # texts and alternative texts
    manifest, generation = load_manifest(tmp_path / "bare")
    publish_manifest(tmp_path / "bare", replace(manifest, rgb=None, previous=generation))
    with pytest.raises(InputError, match="no latent-to-RGB map; name the model.*--vae"):
        preview(tmp_path / "bare", tmp_path / "out")
    with pytest.raises(InputError, match="is no folder"):
        preview(made, tmp_path / "nowhere" / "out")


def test_the_map_needs_no_torch(made: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom qwen_lora.cli import app\n"
        f"sys.argv = ['x', 'shards', 'preview', {str(made)!r}, '--output', "
        f"{str(tmp_path / 'out')!r}, '--seed', '3']\n"
        "try:\n    app()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert not {'torch', 'diffusers', 'webdataset', 'cv2'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 samples" in result.stdout
