"""RUN/previews: one folder a step, whole or absent, with a PNG for each prompt.

    previews/step-000250/000.png, 001.png, ...   one picture a prompt, in the prompts' order
    previews/step-000250/prompts.json            the prompts and how they were drawn

Imports no torch.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_lora.errors import QwenLoraError
from qwen_lora.posix import fsync_folder, new_folder_mode, write_atomic

FOLDER, PROMPTS = "previews", "prompts.json"
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".new-"


class PreviewFiles:
    """The pictures of one run. Only rank 0 writes."""

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have pictures, in order."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def write(self, step: int, pictures: Sequence[bytes], facts: dict[str, Any]) -> None:
        """Publish one step's PNGs. Raises QwenLoraError when the disk refuses."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
            try:
                temporary.chmod(new_folder_mode())
                for number, data in enumerate(pictures):
                    write_atomic(temporary / f"{number:03d}.png", data)
                text = json.dumps(facts, ensure_ascii=False, indent=1) + "\n"
                write_atomic(temporary / PROMPTS, text.encode())
                if self.path(step).exists():
                    self._remove(self.path(step))
                temporary.rename(self.path(step))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            fsync_folder(self.folder)
        except OSError as error:
            raise QwenLoraError(
                f"cannot write the previews of step {step} in {self.folder}: {error}; the "
                "checkpoints are intact, free some space and run the same command again"
            ) from error

    def read_facts(self, step: int) -> dict[str, Any]:
        """What `write` was given; {} when it cannot be read."""
        try:
            facts = json.loads((self.path(step) / PROMPTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def continue_from(self, step: int) -> None:
        """Drop what an interrupted write left, and the pictures of steps after `step`, which are
        going to be trained again."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name.startswith(_TEMPORARY):
                shutil.rmtree(path)
        for later in self.steps():
            if later > step:
                self._remove(self.path(later))

    def clear(self) -> None:
        """Remove every picture, and the folder if nothing else is in it."""
        self.continue_from(-1)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove(self, path: Path) -> None:
        """Take the name away first: a half-deleted folder must never look like a step's."""
        aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
        path.rename(aside / path.name)
        shutil.rmtree(aside)
