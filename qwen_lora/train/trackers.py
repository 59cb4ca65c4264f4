"""TensorBoard and Weights & Biases through accelerate's trackers, when asked for and installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

# tracker -> modules, any of which accelerate can use
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trackers(settings: Settings) -> None:
    """Raise InputError naming the extra for a tracker that is not installed."""
    for name in settings.report_to:
        if not any(importlib.util.find_spec(module) for module in _MODULES[name]):
            raise InputError(
                f"report_to: {name} is not installed; "
                f"pip install 'qwen-lora[{name}]' or leave it out"
            )


class Trackers:
    """Sends numbers to the trackers. One that fails is reported once and never stops a run."""

    def __init__(self, accelerator: Accelerator, settings: Settings) -> None:
        self._accelerator = accelerator
        self._on = bool(settings.report_to) and accelerator.is_main_process
        if self._on:
            self._try(self._start, settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        if self._on and numbers:
            self._try(self._accelerator.log, numbers, step=step)

    def log_images(self, pictures: Sequence[Image], step: int) -> None:
        """Previews of one step, all of one size."""
        for tracker in self._accelerator.trackers if self._on else ():
            images = np.stack([np.asarray(picture) for picture in pictures])  # [N, H, W, 3]
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self._try(tracker.log_images, {"previews": images}, step=step, **layout)

    def close(self) -> None:
        if self._on:
            for tracker in self._accelerator.trackers:
                self._try(tracker.finish)

    def _start(self, settings: Settings) -> None:
        folder = settings.output_dir / settings.logging_dir
        folder.mkdir(parents=True, exist_ok=True)
        simple = {
            key: value
            for key, value in settings.model_dump(mode="json").items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._accelerator.init_trackers(settings.tracker_project_name, config=simple)

    def _try(self, call: Any, *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except Exception as error:  # whatever a tracker raises: network, quota, its own bugs
            self._on = False
            print(f"warning: tracking stopped: {type(error).__name__}: {error}", file=sys.stderr)
