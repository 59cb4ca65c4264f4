"""metrics.jsonl has each step once, whatever happened in between."""

from pathlib import Path

from PIL import Image

from qwen_lora.train.metrics import MetricsFile, read_metrics
from qwen_lora.train.plot import plot_loss


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write({"step": 0, "validation_loss": 2.0})
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": float(step)})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash
    metrics.continue_from(2)
    metrics.write({"step": 3, "loss": 30.0})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] == 30.0
    assert metrics.last_step_of("validation_loss") == 0
    assert metrics.last_step_of("nothing") == -1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = MetricsFile(None)
    metrics.write({"step": 1})
    metrics.continue_from(0)
    assert list(tmp_path.iterdir()) == []


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 30):
        metrics.write({"step": step, "loss": 1 / step, "smoothed_loss": 2 / step})
    metrics.write({"step": 0, "fixed_train_loss": 1.0})
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1200, 750)
        colors = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colors is not None and len(colors) > 10  # curves, not an empty frame
