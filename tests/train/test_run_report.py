"""The report of a run: what it says, that it loads nothing, and that it renders in a browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_sets import MakeSettings, random_map, random_prompts, random_set

from qwen_lora.config.schema import Settings
from qwen_lora.errors import Stopped
from qwen_lora.train.preview_files import PreviewFiles
from qwen_lora.train.report import drawn, spread
from qwen_lora.train.report.charts import (
    MAX_POINTS,
    Series,
    line_chart,
    nice_ticks,
    number,
    thinned,
    tick_labels,
    value_range,
)
from qwen_lora.train.report.facts import by_name, histogram, setting_lines, without_folders
from qwen_lora.train.report.page import duration
from qwen_lora.train.report.pictures import Copies
from qwen_lora.train.run import train
from qwen_lora.train.step import Stepper

HOSTILE = "<script>alert('{}')</script> \"quoted\" & <img src=x onerror=y>"
PROMPTS = ["a red fox", HOSTILE.format("prompt")]
VOID = {"meta", "img", "br"}
SMALL: dict[str, Any] = {
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "validation_steps": 2,
    "validation_fraction": 0.3,
    "preview_inference_steps": 2,
    "logging_steps": 1,
}


class Page(HTMLParser):
    """Tags, attributes and visible text; fails on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += " " + data


@pytest.fixture(scope="module")
def reported(
    transformer_only: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, str]:
    """A finished run with hostile captions and prompts; tests must not change it."""
    folder = tmp_path_factory.mktemp("report")
    shards = random_set(
        folder / "shards",
        12,
        rgb=random_map(),
        prompts=random_prompts(PROMPTS),
        texts=(HOSTILE, HOSTILE),
    )
    settings = Settings(
        shards_dir=shards,
        pretrained_model_name_or_path=str(transformer_only),
        output_dir=folder / "fox-run",
        rank=4,
        train_batch_size=2,
        gradient_checkpointing=False,
        **SMALL,
    )
    train(settings)
    return settings, (settings.output_dir / "report.html").read_text(encoding="utf-8")


def words(html: str) -> str:
    return " ".join(Page(html).text.split())


def test_what_it_says(reported: tuple[Settings, str]) -> None:
    settings, html = reported
    said = words(html)
    for text in (
        "fox-run done",
        "LoRA of rank 4 for transformer-only",
        "Steps 6 of 6",
        "Held-out loss",
        "Learning rate",
        "Gradient norm",
        "Held-out loss by noise level",
        "base step 2 step 4 step 6",
        "seed 0, 2 steps, guidance 4, 32 ×",
        "32 × 64",
        "held out",
        "Waiting for data",
        "Memory, process",
        "8,192",  # parameters
        'from_pretrained("transformer-only"',
        'load_lora_weights("lora.safetensors")',
        "checkpointing_steps 2",
        "learning_rate",
    ):
        assert text in said, text
    size = (settings.output_dir / "lora.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB" in said
    assert re.search(r"σ step 0 step 6 change 0\.1 [\d.]+ [\d.]+ [+−][\d.]+%", said)
    pictures = [facts for tag, facts in Page(html).tags if tag == "img"]
    assert len(pictures) == 4 * len(PROMPTS) + 12  # previews and thumbnails
    assert all(facts["src"].startswith("data:image/webp;base64,") for facts in pictures)


def test_the_numbers_are_those_of_the_metrics(reported: tuple[Settings, str]) -> None:
    settings, html = reported
    lines = (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first, last = (
        [row for row in rows if "validation_loss" in row][index]["validation_loss_at_0.9"]
        for index in (0, -1)
    )
    change = f"{last / first - 1:+.1%}".replace("-", "−")
    assert f"0.9 {number(first)} {number(last)} {change}" in words(html)
    assert f"Loss, smoothed {number(rows[-2]['smoothed_loss'])}" in words(html)


def test_it_loads_nothing(reported: tuple[Settings, str]) -> None:
    tags = Page(reported[1]).tags
    names = {tag for tag, _ in tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "use"}
    for tag, facts in tags:
        for name, value in facts.items():
            assert name not in ("href", "srcset", "background", "action", "xlink:href"), tag
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/webp;base64,")
            if name == "style":
                assert "url" not in value and ":" in value
    style = re.search(r"<style>(.*?)</style>", reported[1], re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "http://" not in reported[1] and "https://" not in reported[1]
    assert "file:" not in reported[1]
    policy = next(facts["content"] for tag, facts in tags if "http-equiv" in facts)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_captions_and_prompts_are_text(reported: tuple[Settings, str]) -> None:
    html = reported[1]
    assert "<script" not in html and "onerror=y>" not in html
    assert HOSTILE.format("prompt") in Page(html).text
    titles = [facts["title"] for tag, facts in Page(html).tags if "title" in facts]
    assert any(title.startswith("<script>alert('") and '"quoted"' in title for title in titles)


def test_it_names_no_place(reported: tuple[Settings, str]) -> None:
    settings, html = reported
    for part in (str(settings.output_dir.parent), str(Path.home()) + "/", "/tmp"):
        assert part not in html, part
    attributes = [value for _, facts in Page(html).tags for value in facts.values()]
    text = " ".join([words(html), *(value for value in attributes if "base64" not in value)])
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    assert "output_dir fox-run" in words(html) and "shards_dir shards" in words(html)


def test_a_stopped_run_says_so(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(max_train_steps=6)
    original = Stepper.run

    def run(self: Stepper, step: int, *arguments: Any) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *arguments)

    monkeypatch.setattr(Stepper, "run", run)
    with pytest.raises(Stopped):
        train(settings)
    said = words((settings.output_dir / "report.html").read_text(encoding="utf-8"))
    assert "run stopped" in said and "Steps 3 of 6" in said
    assert "lora.safetensors written at the end of the run" in said
    assert "Samples while training" not in said  # nothing was drawn
    assert "picture" in said  # captions without thumbnails: these shards have no map


def test_without_captions_and_names(make_settings: MakeSettings, tmp_path: Path) -> None:
    shards = random_set(tmp_path / "bare", 6, rgb=random_map(), texts=None)
    settings = make_settings(shards_dir=shards, preview_steps=2, **{**SMALL, "rank": 2})
    train(settings)
    html = (settings.output_dir / "report.html").read_text(encoding="utf-8")
    said = words(html)
    assert re.search(r"sample [0-9a-f]{12}", said)  # a row of previews
    assert "picture " not in said.replace("a picture", "") and ".png" not in said.replace(
        "picture.png", ""
    )


def test_a_report_that_fails_is_a_warning(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(max_train_steps=2)
    (settings.output_dir / "report.html").mkdir(parents=True)
    result = train(settings)
    assert result.lora.exists()
    assert capsys.readouterr().err.count("report.html was not written: IsADirectoryError") == 1
    assert not list(settings.output_dir.glob("*.tmp"))


def test_many_large_pictures_stay_within_bounds(tmp_path: Path) -> None:
    """Noise compresses worst. 20 steps of 18 prompts: 8 columns, 16 rows, under 2 MB."""
    files = PreviewFiles(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(tmp_path / "noise.png")
    noise = (tmp_path / "noise.png").read_bytes()
    prompts = [f"prompt {number}" for number in range(18)]
    for step in range(0, 20):
        files.folder.mkdir(exist_ok=True)
        folder = files.path(step)
        folder.mkdir()
        (folder / "prompts.json").write_text(json.dumps({"prompts": prompts}))
        for number_ in range(len(prompts)):
            os.link(tmp_path / "noise.png", folder / f"{number_:03d}.png")
    assert len(noise) > 150_000
    found = drawn(files, Copies())
    assert found is not None and len(found.steps) == 8 and len(found.rows) == 16
    assert (found.steps[0], found.steps[-1]) == (0, 19)
    assert (found.steps_left_out, found.prompts_left_out) == (12, 2)
    assert sum(len(uri) for _, uris in found.rows for uri in uris if uri) < 2_000_000


def test_pictures_that_are_not_there_leave_a_gap(tmp_path: Path) -> None:
    files = PreviewFiles(tmp_path)
    buffer = tmp_path / "one.png"
    Image.new("RGB", (16, 16), "red").save(buffer)
    files.write(0, [buffer.read_bytes()], {"prompts": ["old"], "decoder": "vae"})
    files.write(5, [buffer.read_bytes(), b"no picture"], {"prompts": ["new", "broken"]})
    found = drawn(files, Copies())
    assert found is not None and not found.exact
    assert [prompt for prompt, _ in found.rows] == ["new", "broken"]
    assert [uri is not None for uri in found.rows[0][1]] == [False, True]
    assert found.rows[1][1] == [None, None]
    assert drawn(PreviewFiles(tmp_path / "nothing"), Copies()) is None


# ---- parts ---------------------------------------------------------------------------------------


def test_lines_are_thinned_without_losing_ends_or_peaks() -> None:
    points = [(float(step), 1.0) for step in range(5000)]
    points[2345] = (2345.0, 9.0)
    for extremes in (True, False):
        kept = thinned(points, extremes=extremes)
        assert len(kept) <= MAX_POINTS and kept == sorted(kept)
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        assert ((2345.0, 9.0) in kept) == extremes
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_the_axis_holds_what_counts() -> None:
    loss = [(float(step), 1.0 + step / 1000) for step in range(300)]
    loss[0] = (0.0, 50.0)  # one outlier must not flatten the rest
    low, high = value_range([Series("raw", loss, 1, faint=True), Series("s", [(0.0, 1.5)], 1)])
    assert 0.9 < low <= 1.0 and 1.5 <= high < 2
    assert value_range([Series("flat", [(0.0, 2.0), (5.0, 2.0)], 1)]) == (1.8, 2.2)
    assert line_chart("nothing", [Series("empty", [], 1)], 5) == ""
    Page(line_chart("<one>", [Series("<s>", [(0.0, 0.0)], 1)], 0))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 200, [0, 50, 100, 150, 200]),
        (0.31, 0.52, [0.35, 0.4, 0.45, 0.5]),
        (0, 3000, [0, 1000, 2000, 3000]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: Sequence[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(ticks)


def test_labels_tell_ticks_apart() -> None:
    assert tick_labels([2.25, 2.275, 2.3]) == ["2.250", "2.275", "2.300"]
    assert tick_labels([0, 5e-5, 1e-4]) == ["0", "5e-5", "1e-4"]
    assert tick_labels([0.0, 1000.0]) == ["0", "1,000"]


def test_numbers_read_well() -> None:
    values = [0, 0.5, 0.12345, 1234.5, 0.0001, 0.00025, 1e-6, -0.25, 99.96]
    shown = ["0", "0.5", "0.123", "1,234", "1e-4", "2.5e-4", "1e-6", "-0.25", "100"]
    assert [number(value) for value in values] == shown
    times = [3.2, 80, 95, 3600, 3 * 3600 + 5 * 60]
    assert [duration(seconds) for seconds in times] == ["3 s", "80 s", "2 min", "60 min"] + [
        "3 h 05 min"
    ]
    assert spread(list(range(0, 100, 5)), 4) == [0, 30, 65, 95]
    assert histogram([3, 3, 5]) == [("3", 2), ("4", 0), ("5", 1)]
    bins = histogram(list(range(10, 110)))
    assert bins[0] == ("10–18", 9) and sum(count for _, count in bins) == 100


def test_paths_are_shown_by_name() -> None:
    changed, default = setting_lines(
        Settings(
            output_dir=Path("/data/alice/runs/fox"),
            shards=["/data/alice/shards", {"path": "b/c", "weight": 2}],
            pretrained_model_name_or_path="/data/alice/model",
            optimizer_args={"log": "/data/alice/log", "k": 3},
        ),
        "model",
    )
    text = json.dumps([changed, default])
    assert "alice" not in text and "b/c" not in text
    assert ("output_dir", "fox") in changed and (
        "pretrained_model_name_or_path",
        "model",
    ) in changed
    assert dict(changed)["optimizer_args"] == "{log: log, k: 3}"
    assert by_name(Path.home()) == "~" and by_name("C:\\Users\\alice\\run") == "run"
    assert without_folders("Qwen/Qwen-Image") == "Qwen/Qwen-Image"


# ---- in a browser --------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROBE = """<script>addEventListener("load", () => {
const images = [...document.images].map(i => i.naturalWidth);
const wide = document.documentElement.scrollWidth > innerWidth;
document.title = "probe " + JSON.stringify({images, wide, width: innerWidth});
})</script>"""


def browse(
    page: Path, profile: Path, *options: str, width: int
) -> subprocess.CompletedProcess[str]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    command += [f"--window-size={width},1600", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("width", [1000, 500])
def test_it_renders(reported: tuple[Settings, str], tmp_path: Path, width: int) -> None:
    """As it stands: a picture that is not blank, no complaint of the browser."""
    picture = tmp_path / "page.png"
    page = reported[0].output_dir / "report.html"
    result = browse(page, tmp_path / "profile", f"--screenshot={picture}", width=width)
    assert picture.exists(), result.stderr
    assert "CONSOLE" not in result.stderr
    with Image.open(picture) as image:
        assert image.size == (width, 1600)
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # text and pictures
    assert (pixels != pixels[0, 0]).any(axis=2).mean() > 0.03


def test_the_browser_decodes_every_picture(reported: tuple[Settings, str], tmp_path: Path) -> None:
    """A copy with a script that reports what the page became; nothing sticks out at the side."""
    copy = tmp_path / "probed.html"
    html = re.sub(r"<meta http-equiv=[^>]*>", "", reported[1])
    copy.write_text(html.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    result = browse(copy, tmp_path / "profile", "--dump-dom", width=500)
    found = re.search(r"<title>probe (.*?)</title>", result.stdout)
    assert found, result.stderr
    facts = json.loads(found[1])
    assert len(facts["images"]) == 4 * len(PROMPTS) + 12 and min(facts["images"]) >= 16
    assert facts["width"] == 500 and not facts["wide"]
