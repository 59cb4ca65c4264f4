"""Stage 2: a LoRA from shard sets. `qwen_lora.train(settings)` runs it: the module can be called,
because the public function and this package share their name. Imports no torch until then."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_lora.config.schema import Settings
    from qwen_lora.train.objective import flow_matching_loss as flow_matching_loss
    from qwen_lora.train.run import TrainResult


class _Stage(ModuleType):
    def __call__(self, settings: Settings, restart: bool = False) -> TrainResult:
        """Run, or resume, a training run; see `qwen_lora.train.run.train`."""
        from qwen_lora.train.run import train

        return train(settings, restart=restart)


def __getattr__(name: str) -> Any:
    if name == "flow_matching_loss":
        from qwen_lora.train.objective import flow_matching_loss

        return flow_matching_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Stage
