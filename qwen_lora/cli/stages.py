"""`qwen-lora precompute` and `qwen-lora train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from qwen_lora.config.schema import Settings

# ---- both ------------------------------------------------------------------------------------
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings in YAML; `qwen-lora init` writes one."),
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting; wins over the file. Repeatable."),
]
Processes = Annotated[
    int | None,
    typer.Option("--num-processes", metavar="N", min=1, help="Devices to use. [default: 1]"),
]
# ---- precompute ------------------------------------------------------------------------------
Dataset = Annotated[
    Path | None,
    typer.Argument(metavar="DATASET", help="Folder of captioned images.", show_default=False),
]
EncoderModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="M",
        help="Hugging Face id (id@revision) or local folder. [default: Qwen/Qwen-Image]",
    ),
]
ShardsOut = Annotated[
    str | None,
    typer.Option(
        "--output", metavar="SHARDS", help="The shard set: folder or URL. [default: shards]"
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir", metavar="DIR", help="With a URL as SHARDS: folder of this machine's state."
    ),
]
Resolutions = Annotated[
    list[int] | None,
    typer.Option(
        "--resolution", metavar="N", min=16, help="About N x N px. Repeatable. [default: 1024]"
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print buckets, counts, bytes and bad files; load no model."),
]
SyncOption = Annotated[
    bool, typer.Option("--sync", help="Retire the samples of images that are gone from DATASET.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Let --sync retire more than 10 % of the set.")]
NoCaptions = Annotated[
    bool, typer.Option("--no-captions", help="Leave caption texts out of the shards.")
]
NoSourceNames = Annotated[
    bool, typer.Option("--no-source-names", help="Leave file names out of the shards.")
]
# ---- train -----------------------------------------------------------------------------------
ShardSets = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SHARDS", help="Shard sets: folders or URLs. [default: shards]", show_default=False
    ),
]
TrainModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="M",
        help="Hugging Face id (id@revision) or local folder. [default: the shards' own]",
    ),
]
TransformerFile = Annotated[
    Path | None,
    typer.Option(
        "--transformer",
        metavar="FILE",
        help="Transformer weights in one safetensors file, diffusers' or ComfyUI's, instead of the "
        "model's.",
    ),
]
Run = Annotated[
    Path | None,
    typer.Option("--output", metavar="RUN", help="Folder of the run. [default: output]"),
]
Steps = Annotated[
    int | None,
    typer.Option("--max-train-steps", metavar="N", min=1, help="Optimizer steps. [default: 3000]"),
]
Rank = Annotated[
    int | None, typer.Option("--rank", metavar="R", min=1, help="LoRA rank. [default: 16]")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="S", min=0, help="Seed of every choice. [default: 0]"),
]
PreviewVae = Annotated[
    bool,
    typer.Option("--preview-vae", help="Exact previews: load the VAE's decoder for them."),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard the run's checkpoints and begin again.")
]


def precompute(
    dataset: Dataset = None,
    model: EncoderModel = None,
    output: ShardsOut = None,
    state_dir: StateDir = None,
    config: Config = None,
    resolution: Resolutions = None,
    num_processes: Processes = None,
    sync: SyncOption = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    no_captions: NoCaptions = False,
    no_source_names: NoSourceNames = False,
    set_options: SetOptions = None,
) -> None:
    """Encode captioned images once: latents and prompt embeddings to a shard set.

    Running it again encodes what is new or changed; images that are gone stay in the set, unless
    --sync. Needs only the model's vae, text_encoder and tokenizer.

    \b
    qwen-lora precompute photos --output shards --resolution 1024
    qwen-lora precompute --config lora.yaml --dry-run
    qwen-lora precompute --config lora.yaml --sync
    """
    settings = _settings(
        "precompute",
        config,
        set_options,
        {
            "data_config.img_dir": dataset,
            "pretrained_model_name_or_path": model,
            "shards_dir": output,
            "state_dir": state_dir,
            "data_config.img_size": resolution,
            "num_processes": num_processes,
            "captions_in_shards": False if no_captions else None,
            "source_names": False if no_source_names else None,
        },
        may_launch=not dry_run,
    )
    if not dry_run:
        _launch_if_asked(settings)
    from qwen_lora.precompute.run import precompute as run

    summary = run(settings, dry_run=dry_run, sync=sync, yes=yes)
    raise typer.Exit(summary.exit_code)


def train(
    shards: ShardSets = None,
    model: TrainModel = None,
    transformer: TransformerFile = None,
    output: Run = None,
    config: Config = None,
    max_train_steps: Steps = None,
    rank: Rank = None,
    seed: Seed = None,
    num_processes: Processes = None,
    preview_vae: PreviewVae = False,
    restart: Restart = False,
    set_options: SetOptions = None,
) -> None:
    """Train a LoRA from shard sets; loads the transformer alone.

    Running it again resumes from the last checkpoint. The result is RUN/lora.safetensors.

    \b
    qwen-lora train shards --output output --max-train-steps 2000 --rank 16
    qwen-lora train --config lora.yaml --num-processes 4
    """
    settings = _settings(
        "train",
        config,
        set_options,
        {
            "shards": list(shards or []),
            "pretrained_model_name_or_path": model,
            "transformer_file": transformer,
            "output_dir": output,
            "max_train_steps": max_train_steps,
            "rank": rank,
            "seed": seed,
            "num_processes": num_processes,
            "preview_vae": preview_vae or None,
        },
    )
    _launch_if_asked(settings)
    from qwen_lora.train.run import train as run

    result = run(settings, restart=restart)
    if _speaks():
        print(result.lora)


def _launches(settings: Settings) -> bool:
    """Whether other processes do the work: this one is no child yet."""
    is_child = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    return settings.num_processes > 1 and not is_child


def _launch_if_asked(settings: Settings) -> None:
    if _launches(settings):
        from qwen_lora.launch import launch_processes

        raise typer.Exit(launch_processes(sys.argv[1:], settings.num_processes))


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _settings(
    command: Literal["precompute", "train"],
    config: Path | None,
    set_options: list[str] | None,
    options: dict[str, Any],
    *,
    may_launch: bool = True,
) -> Settings:
    """Load them and say on stderr what they are."""
    from qwen_lora.config.load import load_settings
    from qwen_lora.config.template import describe

    notes: list[str] = []
    settings = load_settings(command, config, set_options or (), options, notes=notes)
    if _speaks() and not (
        may_launch and _launches(settings)
    ):  # with several processes the first of them says it
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(describe(command, settings), file=sys.stderr)
    return settings
