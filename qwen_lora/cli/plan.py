"""`qwen-lora plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_lora.cli.stages import Config, SetOptions, ShardSets, TrainModel, TransformerFile
from qwen_lora.cli.streams import print_json, reader_may_leave
from qwen_lora.errors import InputError

if TYPE_CHECKING:
    from qwen_lora.config.schema import Settings

Memory = Annotated[
    float | None,
    typer.Option(
        "--memory", metavar="GIB", min=0.1, help="Of the card. [default: this machine's GPU]"
    ),
]
Tflops = Annotated[
    float | None,
    typer.Option(
        "--tflops", metavar="X", min=1e-6, help="Rate of matrix products. [default: measured here]"
    ),
]
Tflops8Bit = Annotated[
    float | None,
    typer.Option(
        "--tflops-8bit",
        metavar="X",
        min=1e-6,
        help="Rate of products in 8 bits, of low_precision_products. [default: measured here, or "
        "twice --tflops]",
    ),
]
Copies = Annotated[
    float | None,
    typer.Option(
        "--h2d",
        metavar="GBPS",
        min=1e-6,
        help="Rate of copies to the GPU, for streamed blocks. [default: measured here]",
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Run one batch with the base in bf16 and in base_precision, and compare loss and "
        "gradients.",
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="A run, to compare its measured steps."),
]


def plan(
    shards: ShardSets = None,
    model: TrainModel = None,
    transformer: TransformerFile = None,
    config: Config = None,
    memory: Memory = None,
    tflops: Tflops = None,
    tflops_8bit: Tflops8Bit = None,
    h2d: Copies = None,
    run: RunFolder = None,
    check: Check = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_options: SetOptions = None,
) -> None:
    """Say what training will take, in memory and time, before it is started.

    Reads the shards' lists and the transformer's config, no weights, unless with --check. Exit
    code 2 when the run does not fit into the memory.

    \b
    qwen-lora plan shards --memory 24 --tflops 150
    qwen-lora plan shards --set base_precision=nf4 --memory 12
    qwen-lora plan shards --set base_precision=fp8 --check
    """
    from qwen_lora.config.load import load_settings

    notes: list[str] = []
    options = {
        "shards": list(shards or []),
        "pretrained_model_name_or_path": model,
        "transformer_file": transformer,
    }
    settings = load_settings("train", config, set_options or (), options, notes=notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    from qwen_lora.train.cost.estimate import estimate, format_estimate

    checked = _check(settings) if check else None  # first: it refuses settings
    facts = estimate(
        settings, memory_gib=memory, tflops=tflops, run=run, h2d=h2d, tflops_8bit=tflops_8bit
    )
    if checked is not None:
        facts["check"] = checked
    with reader_may_leave():
        if as_json:
            print_json(facts, indent=2)
        else:
            print(format_estimate(facts))
            if checked is not None:
                from qwen_lora.train.parity import format_check

                print("\n" + format_check(checked))
    if "does_not_fit" in facts:
        raise InputError(facts["does_not_fit"])


def _check(settings: Settings) -> dict[str, Any]:
    from qwen_lora.train.parity import check_precision

    return check_precision(settings)
