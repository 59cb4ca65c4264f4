"""What stage 1 remembers between runs, in SHARDS/.local: source hashes and failed samples.

Only a help: without these files the same shards come out, later.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen_lora.hashing import canonical_json
from qwen_lora.posix import read_own, write_atomic
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, Skip

SETTLED_NS = 2_000_000_000  # a file younger than this may still change within one clock tick
DECODERS = ("pillow", "opencv-python-headless", "opencv-python", "pillow-heif")
_SOURCE = (int, int, int, str, int, int)  # bytes, mtime_ns, inode, sha256, height, width
_FAILURE = (str, str)  # reason, detail
PASSING = ("unreadable", "source_changed")  # reasons that say nothing about the image


def decoder_versions() -> dict[str, str]:
    """Installed versions of the packages that read images."""
    found = {}
    for name in DECODERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RememberedSources:
    """sha256 and size of images by (path, length, mtime_ns, inode): a rerun reads no image.

    `rules` are the settings that decide whether an image is accepted; others forget everything.
    """

    def __init__(self, file: Path, rules: Mapping[str, Any]) -> None:
        self._file = file
        self._rules = {**rules, "decoders": decoder_versions()}
        self._known: dict[str, list[Any]] = _load(file, self._rules, _SOURCE)
        self._used: dict[str, list[Any]] = {}

    def find(self, candidate: Candidate) -> Inspection | None:
        key = _key(candidate.image)
        entry = self._known.get(key)
        if entry is None or entry[:3] != _identity(candidate.image):
            return None
        self._used[key] = entry
        return Inspection(candidate, entry[3], (entry[4], entry[5]))

    def known_at(self, image: ImageSource) -> str | None:
        """The sha256 that a path's image had when it was last read, whatever is there now."""
        entry = self._known.get(_key(image))
        return None if entry is None else str(entry[3])

    def identity(self, image: ImageSource) -> list[int] | None:
        """To be taken before the image is read, and given back to `remember` after."""
        return _identity(image)

    def remember(self, inspection: Inspection, identity: list[int] | None) -> None:
        if identity is None or time.time_ns() - identity[1] < SETTLED_NS:
            return
        entry = [*identity, inspection.source_sha256, *inspection.original_size]
        self._used[_key(inspection.candidate.image)] = entry

    def save(self) -> None:
        """Keeps the entries of this scan and, of others, those whose file was not seen."""
        write_atomic(
            self._file,
            canonical_json({"rules": self._rules, "known": {**self._known, **self._used}}),
        )


class RememberedFailures:
    """Samples that could not be made, by sample id, which names source, geometry and encoders."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rules = {"decoders": decoder_versions(), "torch": version("torch")}
        self._known: dict[str, list[str]] = _load(file, self._rules, _FAILURE)

    def find(self, sample_id: str, name: str) -> Skip | None:
        entry = self._known.get(sample_id)
        return None if entry is None else Skip(name, entry[0], entry[1])

    def as_json(self, sample_ids: list[str]) -> dict[str, list[str]]:
        return {each: self._known[each] for each in sample_ids if each in self._known}

    def remember(self, failures: Mapping[str, Skip]) -> None:
        known = {
            each: [skip.reason, skip.detail]
            for each, skip in failures.items()
            if skip.reason not in PASSING
        }
        if known.items() <= self._known.items():
            return
        self._known.update(known)
        write_atomic(self._file, canonical_json({"rules": self._rules, "known": self._known}))


def _load(file: Path, rules: dict[str, Any], types: tuple[type, ...]) -> dict[str, Any]:
    """name -> a list of values of these types; what is anything else was never remembered."""
    try:
        content = json.loads(read_own(file))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("rules") != rules:
        return {}
    known = content.get("known")
    if not isinstance(known, dict):
        return {}
    return {
        name: entry
        for name, entry in known.items()
        if isinstance(entry, list) and tuple(map(type, entry)) == types
    }


def _key(image: ImageSource) -> str:
    path = os.path.abspath(image.path)
    return path if image.offset is None else f"{path}@{image.offset}+{image.size}"


def _identity(image: ImageSource) -> list[int] | None:
    try:
        facts = os.stat(image.path)
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]
