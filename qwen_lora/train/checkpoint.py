# ruff: noqa: TID253
"""Checkpoints: whole or absent, verified, and made of safetensors and JSON only.

    RUN/checkpoints/step-00000250/
        lora.safetensors        trained A and B in float32, by parameter name
        optimizer.safetensors   the optimizer's tensors
        state.json              the cursor, what the run depends on, sha256 and size of both files

A checkpoint is written under a temporary name, fsynced and renamed; old ones go only after that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.hashing import canonical_json, hash_json, sha256_hex
from qwen_lora.posix import fsync_folder, make_folder

FORMAT = 1
LORA_FILE, OPTIMIZER_FILE, STATE_FILE = "lora.safetensors", "optimizer.safetensors", "state.json"
FILES = (STATE_FILE, LORA_FILE, OPTIMIZER_FILE)
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".new-"
_REMOVED = ".old-"
_NONSENSE = (LookupError, TypeError, ValueError, AttributeError)  # what a forged state raises


@dataclass(frozen=True)
class RunFacts:
    """What a run's result depends on, fixed at its first start and compared at every resume."""

    settings: dict[str, Any]  # those that change the result, flat: "data_config.x" -> JSON value
    compute_dtype: str
    micro_batches_per_step: int  # accumulation x ranks
    plan_id: str
    generations: tuple[str, ...]  # manifest file name of each shard set, in the order of `shards`
    fingerprints: tuple[str, ...]  # fingerprint hash of each shard set
    base_model: str  # hash over the transformer's config and weight files
    scheduler: dict[str, Any] | None = None  # its config, where timestep_shift: model follows it
    # What was chosen for this machine; not compared, a resume takes it over.
    attention: str | None = None  # the GPU's kernel
    compiled: bool | None = None  # what compile_blocks: auto came to
    recompute: str | None = None  # of compiled blocks, which round by it
    blocks_on_device: int | None = None  # and by which are streamed; None: all stay


@dataclass(frozen=True)
class TrainState:
    """Where a run is. The cursor is (epoch, epoch_step); no random state is needed."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    epoch_step: int = 0  # steps done inside the epoch
    samples: int = 0
    smoothed_loss: float | None = None
    interval_losses: tuple[float, ...] = ()  # since the last line of metrics.jsonl


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's content. `optimizer` and `scaler` are JSON trees of `qwen_lora.train.tree`
    whose tensors are in `optimizer_tensors`."""

    facts: RunFacts
    state: TrainState
    lora: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer: Any = None
    scheduler: Any = None
    scaler: Any = None


class CheckpointError(QwenLoraError):
    """A checkpoint is damaged: which file, and how."""


class CheckpointStore:
    """The checkpoints of one run. Only rank 0 writes."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first, sound or not."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def sweep(self) -> None:
        """Remove what an interrupted save left behind. The run's lock must be held."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_TEMPORARY, _REMOVED)):
                    shutil.rmtree(path)

    def save(self, checkpoint: Checkpoint, keep: int) -> Path:
        """Publish a checkpoint, then remove all but the newest `keep` and any of a later step (left
        by an abandoned continuation). Raises QwenLoraError when the disk refuses."""
        files = to_files(checkpoint)
        step = checkpoint.state.step
        try:
            make_folder(self.folder)
            published = self._publish(self.path(step), files)
            kept = [other for other in self.steps() if other <= step][-keep:]
            for other in self.steps():
                if other not in kept:
                    self._remove(self.path(other))
        except OSError as error:
            raise QwenLoraError(
                f"cannot save the checkpoint of step {step} in {self.folder}: {error}; "
                "earlier checkpoints are intact, free some space and run the same command again"
            ) from error
        return published

    def load(self, step: int) -> Checkpoint:
        """Read and verify one checkpoint. Raises CheckpointError naming the damaged file."""
        folder = self.path(step)
        files = {}
        for name in FILES:
            try:
                files[name] = (folder / name).read_bytes()
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        return from_files(files, folder)

    def _publish(self, final: Path, files: Mapping[str, bytes]) -> Path:
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
        try:
            temporary.chmod(0o777 & ~_umask_of(self.folder))
            for name, data in files.items():
                with open(temporary / name, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            fsync_folder(temporary)
            if final.exists():  # a damaged one, or one of an abandoned continuation
                self._remove(final)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(self.folder)
        return final

    def _remove(self, path: Path) -> None:
        """Take the name away first: a half-deleted folder must never look like a checkpoint."""
        aside = Path(tempfile.mkdtemp(prefix=_REMOVED, dir=self.folder))
        os.rename(path, aside / path.name)
        shutil.rmtree(aside)


def to_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """A checkpoint as the content of its three files."""
    files = {
        LORA_FILE: save(dict(checkpoint.lora)),
        OPTIMIZER_FILE: save(dict(checkpoint.optimizer_tensors)),
    }
    return files | {STATE_FILE: _state_json(checkpoint, files)}


def from_files(files: Mapping[str, bytes], folder: Path) -> Checkpoint:
    """Verify the content of the three files in `folder`. Raises CheckpointError naming one."""
    try:
        state = _read_state(files[STATE_FILE], folder / STATE_FILE)
        tensors = {}
        for name in (LORA_FILE, OPTIMIZER_FILE):
            data, expected = files[name], state["files"][name]
            if len(data) != expected["bytes"] or sha256_hex(data) != expected["sha256"]:
                raise CheckpointError(f"{folder / name} is damaged: its sha256 is not the recorded")
            tensors[name] = load(data)
        return Checkpoint(
            facts=RunFacts(**_with_tuples(state["facts"])),
            state=TrainState(**_with_tuples(state["state"])),
            lora=tensors[LORA_FILE],
            optimizer_tensors=tensors[OPTIMIZER_FILE],
            optimizer=state["optimizer"],
            scheduler=state["scheduler"],
            scaler=state["scaler"],
        )
    except (SafetensorError, *_NONSENSE) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of format {FORMAT}: {type(error).__name__} {error}"
        ) from None


def _read_state(data: bytes, path: Path) -> dict[str, Any]:
    """The verified content of state.json."""
    try:
        state = json.loads(data)
        recorded = state.pop("sha256")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if hash_json(state) != recorded:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the recorded")
    if state["format"] != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}"
        )
    return dict(state)


def newest_good(store: CheckpointStore, wanted: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, and what is to be said about damaged ones.

    wanted: "latest" or a checkpoint folder's name. With "latest" a damaged checkpoint is passed
    over for the one before it. None when the run has no checkpoint. Raises InputError for a name
    that does not exist, CheckpointError when no checkpoint is sound or the named one is damaged.
    """
    steps = store.steps()
    if wanted != "latest":
        match = _NAME.fullmatch(Path(wanted).name)
        if match is None or int(match[1]) not in steps:
            names = ", ".join(store.path(step).name for step in steps) or "none"
            raise InputError(
                f"resume_from_checkpoint: {wanted!r} is not a checkpoint here; there are: {names}"
            )
        return store.load(int(match[1])), []
    notes: list[str] = []
    for step in reversed(steps):
        try:
            return store.load(step), notes
        except CheckpointError as error:
            notes.append(f"{error}; falling back to the checkpoint before it")
    if steps:
        raise CheckpointError(
            f"no checkpoint in {store.folder} is sound ({notes[0].split(';')[0]}); "
            "--restart starts over"
        )
    return None, notes


def _state_json(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> bytes:
    content = {
        "format": FORMAT,
        "facts": asdict(checkpoint.facts),
        "state": asdict(checkpoint.state),
        "optimizer": checkpoint.optimizer,
        "scheduler": checkpoint.scheduler,
        "scaler": checkpoint.scaler,
        "files": {
            name: {"bytes": len(data), "sha256": sha256_hex(data)} for name, data in files.items()
        },
    }
    # Through JSON once, so that what is hashed is what a reader hashes (tuples, int keys).
    content = json.loads(canonical_json(content))
    return canonical_json({**content, "sha256": hash_json(content)})


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }


def _umask_of(folder: Path) -> int:
    """What the umask took away when `folder` was made; mkdtemp's own mode is 0700."""
    return 0o777 & ~(folder.stat().st_mode & 0o777)
