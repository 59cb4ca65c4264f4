"""RUN: the folder of one training run.

settings.yaml    the resolved settings of the last start
metrics.jsonl    the curves; loss.png shows them
checkpoints/     see qwen_lora.train.checkpoint
previews/        see qwen_lora.train.preview_files
report.html      all of it on one page
lora.safetensors the result; result.json says of which step it is
.lock            held while a process trains here
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.hashing import canonical_json, sha256_file
from qwen_lora.posix import exclusive_lock, make_folder, write_atomic
from qwen_lora.redact import redact_values
from qwen_lora.train.checkpoint import (
    FILES,
    Checkpoint,
    CheckpointStore,
    from_files,
    newest_good,
    to_files,
)
from qwen_lora.train.metrics import FILE as METRICS_FILE
from qwen_lora.train.preview_files import PreviewFiles

if TYPE_CHECKING:
    from qwen_lora.train.ranks import Ranks

LORA, PLOT, REPORT, SETTINGS, RESULT, LOCK = (
    "lora.safetensors",
    "loss.png",
    "report.html",
    "settings.yaml",
    "result.json",
    ".lock",
)
WEIGHT_HASHES = ".weight-hashes.json"  # remembers the base model's


@dataclass(frozen=True)
class TrainResult:
    """What a run has made."""

    lora: Path  # lora.safetensors
    steps: int  # optimizer steps behind it, resumed ones included
    resumed_from: int | None = None  # step of the checkpoint that this start continued
    already_done: bool = False  # nothing was left to train


@dataclass(frozen=True)
class RunFolder:
    path: Path
    store: CheckpointStore

    @property
    def lora(self) -> Path:
        return self.path / LORA

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def plot(self) -> Path:
        return self.path / PLOT

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def previews(self) -> PreviewFiles:
        return PreviewFiles(self.path)

    def write_settings(self, settings: Settings) -> None:
        values = redact_values(settings.model_dump(mode="json"))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        try:
            write_atomic(self.path / SETTINGS, text.encode())
        except OSError as error:
            raise QwenLoraError(f"cannot write {self.path / SETTINGS}: {error}") from error

    def write_result(self, step: int) -> None:
        """Called after the LoRA file is in place: what it is, so that a rerun knows it is done."""
        facts = {"step": step, "sha256": sha256_file(self.lora)}
        write_atomic(self.path / RESULT, canonical_json(facts))

    def result_step(self) -> int | None:
        """The step of a whole, undamaged LoRA file; None if there is none."""
        try:
            facts: dict[str, Any] = json.loads((self.path / RESULT).read_bytes())
            intact = sha256_file(self.lora) == facts["sha256"]
            return int(facts["step"]) if intact else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def refuse_to_overwrite(self) -> None:
        """A result whose checkpoints are gone cannot be continued, and must not be lost to a run
        from step 0. Raises InputError."""
        if self.lora.exists():
            raise InputError(
                f"{self.lora} is there, but no checkpoint to continue from; choose another "
                "--output to keep it, or start over with --restart"
            )

    def sweep(self) -> None:
        """Remove what interrupted writes left behind. The run's lock must be held."""
        self.store.sweep()
        for name in (METRICS_FILE, LORA, PLOT, REPORT, SETTINGS, RESULT, WEIGHT_HASHES):
            for path in self.path.glob(f".{name}-*.tmp"):
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """--restart: remove what an earlier run wrote here, and nothing else."""
        self.sweep()
        for name in (METRICS_FILE, LORA, PLOT, REPORT, SETTINGS, RESULT):
            (self.path / name).unlink(missing_ok=True)
        self.previews.clear()
        for step in self.store.steps():
            shutil.rmtree(self.store.path(step))


@contextmanager
def open_run(ranks: Ranks, settings: Settings, restart: bool) -> Iterator[RunFolder]:
    """The run's folder, locked against a second start; what an interrupted save left is removed.

    Raises InputError on every rank when another process holds it or it cannot be written.
    """
    path = settings.output_dir
    run = RunFolder(path, CheckpointStore(path))
    with ExitStack() as stack:

        def prepare() -> None:
            try:
                make_folder(path)
                stack.enter_context(exclusive_lock(path / LOCK, str(path)))
                run.forget() if restart else run.sweep()
            except OSError as error:
                raise InputError(f"output_dir {path} cannot be written: {error}") from error

        ranks.on_main(prepare)
        yield run


def find_checkpoint(ranks: Ranks, run: RunFolder, settings: Settings) -> Checkpoint | None:
    """The checkpoint to continue from, or None for a first start. Rank 0 chooses and reads it; the
    others, whose machines may not see its disk, get it from there."""
    found: Checkpoint | None = None

    def choose() -> int | None:
        nonlocal found
        found, notes = newest_good(run.store, settings.resume_from_checkpoint)
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        return found.state.step if found else None

    step = ranks.on_main(choose)
    if step is None or ranks.world == 1:
        return found
    own = to_files(found) if found is not None else {}
    files = {name: ranks.broadcast(own.get(name, b"")) for name in FILES}
    return ranks.everywhere(lambda: found or from_files(files, run.store.path(step)))
