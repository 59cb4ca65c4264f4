"""Captions from metadata.jsonl, metadata.csv and captions.json, each for its own directory."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_lora.errors import InputError
from qwen_lora.precompute.captions import ROW_KEYS, CaptionError, texts_of
from qwen_lora.precompute.files import open_regular
from qwen_lora.precompute.walk import json_name

CSV_FIELD_BYTES = 1 << 24  # Python's own limit is below that of a caption


@dataclass(frozen=True)
class Row:
    """What one metadata file says about one image."""

    where: str  # "metadata.jsonl row 3"
    texts: list[str] | None  # None: the row has no caption
    problem: CaptionError | None = None
    missing: bool = False  # it names a file that is not there


def read_metadata(
    root: Path, names: Collection[str], images: Collection[str]
) -> dict[str, list[Row]]:
    """The rows of the metadata files `names`, by relative image name.

    `images` are the known relative names. Raises InputError, with the file and the row, for a file
    that is not what its name says, a row without a file name or with one outside the metadata
    file's directory, a second row for one file, and when not one of the named files is there.
    """
    rows: dict[str, list[Row]] = {}
    for name in names:
        for target, row in _read_file(root, name, images).items():
            rows.setdefault(target, []).append(row)
    return rows


def _read_file(root: Path, name: str, images: Collection[str]) -> dict[str, Row]:
    shown = json_name(name)
    try:
        with open_regular(root / name) as file:
            content = file.read()
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from None
    folder = os.path.dirname(name)
    readers = {"metadata.jsonl": _jsonl, "metadata.csv": _csv, "captions.json": _captions_json}
    found: dict[str, Row] = {}
    for where, row in readers[os.path.basename(name)](content, shown):
        target = _target(folder, _file_name(row, where), where)
        if target in found:
            raise InputError(
                f"{where}: {json_name(target)} has a caption in {found[target].where} already; "
                "remove one, or give several captions as a list"
            )
        if target not in images and not _is_there(root, target):
            found[target] = Row(where, None, missing=True)
            continue
        try:
            found[target] = Row(where, texts_of(row, ROW_KEYS))
        except CaptionError as error:
            found[target] = Row(where, None, error)
    if found and all(row.missing for row in found.values()):
        target, first = next(iter(found.items()))
        raise InputError(
            f"{first.where}: {json_name(target)} is not there, nor is any other file that {shown} "
            "names; correct the names or remove it"
        )
    return found


def _jsonl(content: bytes, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_without_mark(content).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{shown} row {number}"
        row = _load_json(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object with file_name and a caption")
        yield where, row


def _csv(content: bytes, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    previous = csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        lines = io.StringIO(_decode(_without_mark(content), shown), newline="")
        reader = csv.DictReader(lines, strict=True)
        header = reader.fieldnames or []
        if "file_name" not in header or not any(key in header for key in ROW_KEYS):
            raise InputError(
                f"{shown}: the first line must name the columns: file_name and one of "
                f"{', '.join(ROW_KEYS)}; it names {', '.join(header) or 'none'}"
            )
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{shown} line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(previous)
    for number, row in enumerate(rows, start=1):
        where = f"{shown} row {number}"
        if None in row:
            raise InputError(
                f"{where}: more cells than the first line has columns; a caption with a comma "
                "needs double quotes"
            )
        yield where, row


def _captions_json(content: bytes, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    value = _load_json(_without_mark(content), shown, _refuse_doubles)
    if isinstance(value, dict):
        for number, (file_name, caption) in enumerate(value.items(), start=1):
            row = caption if isinstance(caption, dict) else {"text": caption}
            yield f"{shown} row {number}", {**row, "file_name": file_name}
    elif isinstance(value, list):
        for number, row in enumerate(value, start=1):
            if not isinstance(row, dict):
                raise InputError(
                    f"{shown} row {number}: not an object with file_name and a caption"
                )
            yield f"{shown} row {number}", row
    else:
        raise InputError(
            f"{shown}: neither an object of file names and captions nor a list of rows"
        )


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a key twice and Python keeps the last: a caption would be lost."""
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"{key!a} is there twice")
        row[key] = value
    return row


def _load_json(content: bytes, where: str, pairs_hook: Any = None) -> Any:
    try:
        return json.loads(_decode(content, where), object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _without_mark(content: bytes) -> bytes:
    return content.removeprefix(b"\xef\xbb\xbf")


def _file_name(row: dict[str, Any], where: str) -> str:
    file_name = row.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where}: no file_name")
    return file_name


def _target(folder: str, file_name: str, where: str) -> str:
    """The row's file, relative to the root. Raises InputError."""
    parts = file_name.split("/")
    try:
        raw = file_name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {file_name!a} is no file name") from None
    shown = json_name(raw)
    if os.path.isabs(file_name) or ".." in parts or os.path.splitdrive(file_name)[0]:
        raise InputError(f"{where}: {shown} leads out of the directory; give a name below it")
    inside = "/".join(part for part in parts if part not in ("", "."))
    inside = os.fsdecode(inside.encode("utf-8", "surrogateescape"))  # as folders are listed
    return f"{folder}/{inside}" if folder else inside


def _is_there(root: Path, target: str) -> bool:
    """Whether it is a file of any kind; an image that cannot be read is reported as such."""
    try:
        return os.path.lexists(root / target) and not os.path.isdir(root / target)
    except ValueError:  # a NUL
        return False
