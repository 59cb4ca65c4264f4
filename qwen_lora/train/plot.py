"""RUN/loss.png: the curves of metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_lora.posix import publish_file, temporary_file
from qwen_lora.train.metrics import read_metrics

_CURVES: dict[str, tuple[str, dict[str, Any]]] = {  # key in metrics.jsonl -> label, line style
    "loss": ("loss", {"alpha": 0.35, "linewidth": 0.8}),
    "smoothed_loss": ("loss, smoothed", {"linewidth": 1.6}),
    "validation_loss": ("held-out images", {"marker": "o", "markersize": 3}),
    "fixed_train_loss": (
        "fixed training images",
        {"marker": "o", "markersize": 3, "linestyle": "--"},
    ),
}


def plot_loss(metrics: Path, image: Path) -> None:
    """Draw the loss curves into a PNG of 1200 x 750 pixels. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, (label, style) in _CURVES.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with temporary_file(image.parent, f".{image.name}-") as (file, path):
        figure.savefig(file, format="png")
    publish_file(path, image)
