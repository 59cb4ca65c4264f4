"""`qwen-lora shards info | verify | list`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at shard sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Argument(metavar="SHARDS", help="The shard set's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def info(path: Folder = Path("shards"), as_json: AsJson = False) -> None:
    """Say what a shard set holds: counts, buckets, recipe, encoders.

    \b
    qwen-lora shards info shards
    """
    from qwen_lora.shards import tools

    facts = tools.info(path)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else tools.format_info(facts))


@app.command()
def verify(
    path: Folder = Path("shards"),
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every record too: shapes, finite values.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte against the hashes; exit code 1 when anything differs.

    \b
    qwen-lora shards verify shards
    """
    from qwen_lora.shards.verify import verify as run

    report = run(path, deep=deep)
    print(report)
    raise typer.Exit(0)


@app.command("list")
def list_samples(
    path: Folder = Path("shards"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    urls: Annotated[
        bool, typer.Option("--urls", help="The shard files, as plain webdataset takes them.")
    ] = False,
) -> None:
    """List samples, one a line: id, bucket, tokens, source.

    \b
    qwen-lora shards list shards --json
    qwen-lora shards list shards --urls
    """
    from qwen_lora.shards import tools

    for sample in tools.list_samples(path):
        print(sample)
