"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwen_lora import __version__
from qwen_lora.cli import more, plan, shards, stages
from qwen_lora.cli.streams import ReaderLeft, steady_streams
from qwen_lora.errors import QwenLoraError, Stopped
from qwen_lora.redact import redact, redact_stderr


class ExitCodes(TyperGroup):
    """Every failure that has a one-line explanation ends with it and with its own exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # a full disk is told here, not when Python ends
        except QwenLoraError as error:
            if not isinstance(error, ReaderLeft) and not _said_by_another(error):
                said = str(error) if isinstance(error, Stopped) else f"error: {error}"
                print(redact(said), file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print("error: interrupted", file=sys.stderr)
            raise typer.Exit(130) from error
        except OSError as error:
            print(redact(f"error: {_what_failed(error)}"), file=sys.stderr)
            raise typer.Exit(1) from error


def _what_failed(error: OSError) -> str:
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _said_by_another(error: QwenLoraError) -> bool:
    """Wrong settings and a stop are the same in every process; one on each machine says so."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    from qwen_lora.config.load import SettingsError

    return isinstance(error, SettingsError | Stopped)


def _not_about_inference(record: logging.LogRecord) -> bool:
    """bitsandbytes recommends a package for 4-bit inference on CPUs whenever it is imported, which
    PEFT does in every process; nothing here would use it."""
    return "gemm_4bit_forward" not in record.msg


app = typer.Typer(
    cls=ExitCodes,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qwen-lora {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train LoRA adapters for Qwen-Image in two stages: cache once, then train lean.

    \b
    qwen-lora precompute photos
    qwen-lora train
    qwen-lora sample --lora output/lora.safetensors --prompt "a red boat" --output boat.png
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_about_inference)


app.command()(stages.precompute)
app.command()(stages.train)
app.command()(plan.plan)
app.command()(more.sample)
app.add_typer(shards.app, name="shards")
app.command()(more.init)
app.command()(more.tiny_model)
app.command()(more.demo)


def main() -> None:
    """The entry point `qwen-lora`."""
    try:
        steady_streams()
        redact_stderr()
        app(prog_name="qwen-lora")
    except KeyboardInterrupt:  # before a command has begun
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except ReaderLeft:  # of --help
        sys.exit(0)
