# ruff: noqa: TID253
"""Whether a run compiles its blocks, where the settings leave it open."""

from __future__ import annotations

import sys

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.train.checkpoint import RunFacts

MIN_STEPS = 200  # a new machine's first run compiles for about a minute


def settle_compile(settings: Settings, device: torch.device, recorded: RunFacts | None) -> Settings:
    """The settings with compile_blocks true or false. recorded: of the run that goes on; each way
    rounds differently."""
    if settings.compile_blocks != "auto":
        return settings
    chosen = recorded.compiled if recorded else _worthwhile(settings, device)
    return settings.model_copy(update={"compile_blocks": bool(chosen)})


def _worthwhile(settings: Settings, device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and settings.own_forward
        and settings.base_precision != "nf4"  # bitsandbytes' layers break each graph
        and settings.max_train_steps >= MIN_STEPS
        # Triton casts float8_e4m3fn from compute capability 8.9 on.
        and torch.cuda.get_device_capability(device)
        >= ((8, 9) if settings.base_precision == "fp8" else (8, 0))
        and compiler_works(device)
    )


def compiler_works(device: torch.device) -> bool:
    """Whether torch compiles a small function; says why not. It wants Triton, and a C compiler with
    Python's headers for what Triton launches."""
    try:
        torch.compile(_trial)(torch.ones(64, device=device))
    except Exception as error:  # whatever is missing
        reason = " ".join(str(error).split())[:200]
        print(f"note: blocks run uncompiled, torch's compiler failed: {reason}", file=sys.stderr)
        return False
    return True


def _trial(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) + 1
