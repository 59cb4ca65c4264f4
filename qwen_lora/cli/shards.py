"""`qwen-lora shards info | verify | list | merge | prune | preview`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_lora.cli.streams import print_json, reader_may_leave
from qwen_lora.errors import InputError

app = typer.Typer(
    help="Look at shard sets, join them, tidy them.", no_args_is_help=True, rich_markup_mode=None
)

Place = Annotated[str, typer.Argument(metavar="SHARDS", help="The shard set: a folder or a URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def info(path: Place = "shards", as_json: AsJson = False) -> None:
    """Say what a shard set holds: counts, buckets, recipe, encoders.

    \b
    qwen-lora shards info shards
    """
    from qwen_lora.shards import tools

    facts = tools.info(path)
    with reader_may_leave():
        if as_json:
            print_json(facts, indent=2)
        else:
            print(tools.format_info(facts))


@app.command()
def verify(
    path: Place = "shards",
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every record too: shapes, finite values.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte against the hashes; exit code 1 when anything differs.

    \b
    qwen-lora shards verify shards --deep
    """
    from qwen_lora.shards.verify import verify as run

    report = run(path, deep=deep)
    if as_json:
        print_json({**asdict(report), "ok": report.ok}, indent=2)
    else:
        for problem in report.problems:
            print(f"problem: {problem}")
        for note in report.notes:
            print(f"note: {note}")
        count = len(report.problems)
        result = "intact" if report.ok else f"{count} problem{'s' * (count > 1)}"
        print(
            f"{result}: {report.samples} samples in {report.shards} shards, "
            f"{report.bytes / (1 << 20):.1f} MiB"
        )
    if not report.ok:
        raise typer.Exit(1)


@app.command("list")
def list_samples(
    path: Place = "shards",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    urls: Annotated[
        bool, typer.Option("--urls", help="The shard files, as plain webdataset takes them.")
    ] = False,
) -> None:
    """List samples, one a line: id, bucket, tokens, source, captions.

    \b
    qwen-lora shards list shards --json
    qwen-lora shards list shards --urls
    """
    from qwen_lora.shards import tools

    with reader_may_leave():
        for each in tools.shard_urls(path) if urls else tools.list_samples(path):
            if as_json:
                print_json(each)
            else:
                print(each if isinstance(each, str) else _line(each))


def _line(sample: dict[str, Any]) -> str:
    height, width = sample["bucket"]
    tokens = "+".join(str(count) for count in sample["token_counts"])
    captions = " | ".join(sample["captions"] or ["(no captions stored)"])
    source = sample["source"] or sample["source_sha256"][:12]
    line = f"{sample['sample_id']}  {height}x{width}  {tokens:>4} tokens  {source}: {captions}"
    # Names and captions are other people's text: nothing in them may steer the terminal.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


@app.command()
def merge(
    sets: Annotated[
        list[str], typer.Argument(metavar="SHARDS...", help="Shard sets: folders or URLs.")
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="SHARDS", help="A new set, or one to append to.")
    ],
    strip: Annotated[
        str | None,
        typer.Option(
            "--strip",
            metavar="WHAT",
            help="Leave out of what is added: captions, source (names), or captions,source.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Join sets made with the same encoders; a sample that several have comes from the first.

    Records are copied and checked, never decoded; retired samples stay behind.

    \b
    qwen-lora shards merge mine theirs --output all
    qwen-lora shards merge mine --output public --strip captions,source
    """
    from qwen_lora.shards.merge import merge as run

    left_out = [each.strip() for each in (strip or "").split(",") if each.strip()]
    if strip is not None and not left_out:  # an empty variable must not publish captions
        raise InputError("--strip names nothing to leave out: captions, source, or captions,source")
    report = run(sets, output, left_out)
    if as_json:
        print_json(asdict(report), indent=2)
        return
    for note in report.notes:
        print(f"note: {note}")
    print(report.line())


@app.command()
def prune(
    path: Place = "shards",
    everything: Annotated[
        bool, typer.Option("--all", help="Keep the newest generation only, not the last two.")
    ] = False,
    unlisted: Annotated[
        bool, typer.Option("--unlisted", help="Remove files too that no kept generation lists.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write shards anew without their retired samples, and remove what old generations needed.

    \b
    qwen-lora shards prune shards --dry-run
    qwen-lora shards prune shards --all
    """
    from qwen_lora.shards.prune import prune as run

    report = run(path, everything=everything, unlisted=unlisted, dry_run=dry_run)
    if as_json:
        print_json(asdict(report), indent=2)
    else:
        print("\n".join(report.lines()))


@app.command()
def preview(
    path: Place = "shards",
    output: Annotated[
        Path,
        typer.Option("--output", metavar="PREFIX", help="Writes PREFIX.png and PREFIX.html."),
    ] = Path("shards-preview"),
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae", metavar="M", help="Decode exactly, with the VAE of this id or local folder."
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Samples shown.")] = 48,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="S", help="Show others than the first of every bucket."),
    ] = None,
) -> None:
    """Draw samples: a contact sheet, and a page with captions that loads nothing.

    Without --vae no model is needed: the set's own map from latents to colours draws them.

    \b
    qwen-lora shards preview shards --output preview
    qwen-lora shards preview shards --vae Qwen/Qwen-Image --count 12
    """
    from qwen_lora.shards.preview import preview as run

    report = run(path, output, vae=vae, count=count, seed=seed)
    print(f"{report.sheet} and {report.page}: {report.shown} of {report.samples} samples")
