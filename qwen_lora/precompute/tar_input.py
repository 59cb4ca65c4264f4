"""WebDataset tars of images and captions as input. Nothing is extracted to disk.

Members of one sample share their path up to the first dot of the base name (WebDataset's rule).
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qwen_lora.config.schema import DataConfig
from qwen_lora.precompute.captions import (
    CAPTION_MAX_BYTES,
    CaptionError,
    caption_types,
    json_texts,
    read_sidecar,
)
from qwen_lora.precompute.files import open_regular
from qwen_lora.precompute.reasons import Reason
from qwen_lora.precompute.types import Candidate, ImageSource, Skip
from qwen_lora.precompute.walk import (
    IMAGE_TYPES,
    SIDECAR_TYPES,
    SYSTEM_FOLDERS,
    file_type,
    json_name,
    type_problem,
)

BLOCK = 512
CHUNK = 1 << 20
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass
class TarScan:
    """What one tar holds."""

    candidates: list[Candidate] = field(default_factory=list)  # by the raw bytes of their names
    skips: list[Skip] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)  # images with two captions
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Member:
    name: str  # normalised, as the tar has it
    offset: int  # of its data
    size: int  # bytes


@dataclass
class _Sample:
    images: list[_Member] = field(default_factory=list)
    captions: dict[str, list[_Member]] = field(default_factory=dict)  # by type


def scan_tar(path: Path, shown: str, group: str, data: DataConfig) -> TarScan:
    """The samples of an uncompressed tar; `shown` is its relative name, `group` its first folder.

    A damaged tar gives its whole samples and a Skip `tar_damaged` in the tar's own name.
    """
    scan = TarScan()
    try:
        with open_regular(path) as file:
            if file.read(6).startswith(COMPRESSED):
                detail = (
                    "only uncompressed tars are read; decompress it first (gunzip, unzstd, ...)"
                )
                scan.skips.append(Skip(shown, "tar_compressed", detail))
                return scan
            samples: dict[str, _Sample] = {}
            damage = _list_members(file, shown, samples, scan)
            for sample in sorted(samples.values(), key=_order):
                _add_sample(file, path, shown, group, sample, data, scan)
    except OSError as error:
        damage = error.strerror or type(error).__name__
    if damage:
        scan.skips.append(Skip(shown, "tar_damaged", damage))
    return scan


def _list_members(
    file: IO[bytes], shown: str, samples: dict[str, _Sample], scan: TarScan
) -> str | None:
    """File the members under their keys; what is wrong with the tar, or None."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if end == 0:
        return "the tar is empty"
    seen: set[str] = set()
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
        position = -1
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # all are kept otherwise
            if info.size < 0 or info.offset <= position:
                return f"a negative size at byte {info.offset}"  # would be read for ever
            position = info.offset
            if info.isreg() and info.offset_data + info.size > end:
                return f"it ends inside {json_name(_raw(info.name))}"
            _file_member(info, shown, samples, seen, scan)
        return _trailing(file, tar.offset, end)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        return f"{error}" or type(error).__name__


def _trailing(file: IO[bytes], offset: int, end: int) -> str | None:
    """tarfile stops at the first bad header without a word; a whole tar ends in zeros there."""
    if end - offset < BLOCK:
        return f"it ends at byte {end} without a closing zero block; it may be cut off"
    file.seek(offset)
    position = offset
    while chunk := file.read(CHUNK):
        if chunk.count(0) != len(chunk):
            first = position + len(chunk) - len(chunk.lstrip(b"\0"))
            return f"no valid header at byte {offset}, and data up to its end (byte {first})"
        position += len(chunk)
    return None


def _file_member(
    info: tarfile.TarInfo, shown: str, samples: dict[str, _Sample], seen: set[str], scan: TarScan
) -> None:
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if info.isdir() or not parts:
        return
    name, base = "/".join(parts), parts[-1]
    if any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts if part != ".."):
        scan.ignored["hidden"] += 1
        return
    kind = file_type(base)
    problem: tuple[Reason, str] | None = type_problem(kind)
    if problem is None and kind not in IMAGE_TYPES and kind not in SIDECAR_TYPES:
        scan.ignored[f".{kind} files in tars" if kind else "other files in tars"] += 1
        return
    if ".." in parts:
        problem = "bad_name", "the name leads out of the tar"
    elif not info.isreg() or info.issparse():
        problem = "not_a_file", "a link or another special member; only regular ones are read"
    elif name in seen:
        problem = "tar_repeated_name", "a second member of this name; the first counts"
    if problem is not None:
        scan.skips.append(Skip(_shown(shown, name), *problem))
        return
    seen.add(name)
    key = "/".join([*parts[:-1], base.partition(".")[0]])
    sample = samples.setdefault(key, _Sample())
    member = _Member(name, info.offset_data, info.size)
    if kind in IMAGE_TYPES:
        sample.images.append(member)
    else:
        sample.captions.setdefault(kind, []).append(member)


def _add_sample(
    file: IO[bytes],
    path: Path,
    shown: str,
    group: str,
    sample: _Sample,
    data: DataConfig,
    scan: TarScan,
) -> None:
    if not sample.images:
        scan.ignored["captions in tars without an image"] += sum(map(len, sample.captions.values()))
        return
    if len(sample.images) > 1:
        detail = "the sample has several images; WebDataset keys end at the first dot"
        scan.skips += [
            Skip(_shown(shown, image.name), "tar_several_images", detail) for image in sample.images
        ]
        return
    image = sample.images[0]
    name = _shown(shown, image.name)
    texts = [
        (kind, member) for kind in caption_types(data) for member in sample.captions.get(kind, [])
    ]
    if len(texts) > 1:
        texts = [text for text in texts if _has_caption(file, *text)] or texts[:1]
    if len(texts) > 1:
        both = " and ".join(
            json_name(_raw(os.path.basename(member.name))) for _, member in texts[:2]
        )
        scan.conflicts.append(f"{name} ({both})")
        return
    try:
        if not texts:
            wanted = ", ".join(f".{kind}" for kind in caption_types(data))
            raise CaptionError("caption_missing", f"no member of its key with {wanted}")
        captions = read_sidecar(texts[0][0], _read(file, texts[0][1]), data)
    except CaptionError as error:
        scan.skips.append(Skip(name, error.reason, error.detail))
        return
    source = ImageSource(name, path, image.offset, image.size)
    first, slash, _ = image.name.partition("/")
    scan.candidates.append(
        Candidate(source, captions, group or (json_name(_raw(first)) if slash else ""))
    )


def _has_caption(file: IO[bytes], kind: str, member: _Member) -> bool:
    if kind != "json":
        return True
    try:
        json_texts(_read(file, member))
    except CaptionError as error:
        return error.reason != "caption_missing"
    return True


def _read(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, CAPTION_MAX_BYTES + 1))


def _shown(tar: str, name: str) -> str:
    return f"{tar}/{json_name(_raw(name))}"


def _raw(name: str) -> bytes:
    """The bytes of a name in the tar, whatever this system's encoding of names."""
    return name.encode("utf-8", "surrogateescape")


def _order(sample: _Sample) -> bytes:
    return _raw(sample.images[0].name) if sample.images else b""
