"""Stage 1: shards from captioned images. `qwen_lora.precompute(settings)` runs it: the module can
be called, because the public function and this package share their name."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_lora.config.schema import Settings
    from qwen_lora.precompute.run import PrecomputeSummary


class _Stage(ModuleType):
    def __call__(self, settings: Settings, dry_run: bool = False) -> PrecomputeSummary:
        """Encode what a shard set lacks; see `qwen_lora.precompute.run.precompute`."""
        from qwen_lora.precompute.run import precompute

        return precompute(settings, dry_run=dry_run)


sys.modules[__name__].__class__ = _Stage
