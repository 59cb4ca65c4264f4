"""Names and captions of a dataset; no pixel is read.

The order is that of the raw bytes of the relative POSIX path, the same on every machine and locale.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from pathlib import Path

from qwen_lora.config.kohya import parse_kohya
from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError
from qwen_lora.precompute.captions import (
    CAPTION_MAX_BYTES,
    CaptionError,
    caption_types,
    finish_captions,
    json_texts,
    read_sidecar,
)
from qwen_lora.precompute.files import open_regular
from qwen_lora.precompute.metadata import Row, read_metadata
from qwen_lora.precompute.tar_input import scan_tar
from qwen_lora.precompute.types import Candidate, ImageSource, Scan, Skip
from qwen_lora.precompute.walk import (
    METADATA_NAMES,
    Tree,
    file_type,
    is_tar,
    json_name,
    stem,
    walk,
)

CONFLICTS_SHOWN = 3


class _Conflict(Exception):
    """Two sources for one image."""


def scan_dataset(dataset: Path, data: DataConfig) -> Scan:
    """Find the images of a folder, of the tars in it, or of one tar, with their captions.

    Raises InputError for a dataset that is missing or holds no image, a folder that cannot be read,
    a metadata file that is wrong, and images with two captions that no setting chooses between.
    """
    tree = _list_dataset(dataset, data)
    scan = Scan([], list(tree.skips))
    rows = read_metadata(tree.root, tree.metadata, frozenset(tree.images))
    scan.skips += [
        Skip(json_name(name), "image_missing", f"{row.where} names it; it is not there")
        for name, found in rows.items()
        for row in found[:1]
        if row.missing
    ]
    conflicts: list[str] = []
    used: set[str] = set()
    tar_ignored: Counter[str] = Counter()
    # A tar stands for the names below it, which no other file can have.
    names = [(os.fsencode(name), name, False) for name in tree.images]
    names += [(os.fsencode(name) + b"/", name, True) for name in tree.tars]
    for _, name, in_tar in sorted(names):
        if in_tar:
            tar = scan_tar(tree.root / name, json_name(name), _group(name), data)
            scan.candidates += tar.candidates
            scan.skips += tar.skips
            conflicts += tar.conflicts
            tar_ignored += tar.ignored
            continue
        try:
            captions = _captions(tree, name, rows.get(name, []), data, used)
        except _Conflict as error:
            conflicts.append(f"{json_name(name)} ({error})")
        except CaptionError as error:
            scan.skips.append(Skip(json_name(name), error.reason, error.detail))
        else:
            image = ImageSource(json_name(name), tree.root / name)
            scan.candidates.append(Candidate(image, captions, _group(name)))
    _refuse_conflicts(conflicts)
    scan.skips.sort(key=lambda skip: skip.name.encode())
    scan.ignored = dict(sorted((_ignored(tree, used) + tar_ignored).items()))
    if not scan.candidates and not scan.skips:
        raise InputError(_nothing_found(dataset, scan.ignored))
    scan.hints = _hints(scan, data)
    return scan


def _list_dataset(dataset: Path, data: DataConfig) -> Tree:
    try:
        mode = os.stat(dataset).st_mode
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise InputError(f"dataset {dataset} does not exist; name a folder of images") from None
        raise InputError(f"dataset {dataset} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return walk(dataset, data.follow_symlinks)
    name = dataset.name
    if stat.S_ISREG(mode) and is_tar(name):
        return Tree(dataset.parent, tars=[name])
    raise InputError(
        f"dataset {dataset} is neither a folder nor a .tar; name the folder it lies in"
    )


def _captions(
    tree: Tree, name: str, rows: list[Row], data: DataConfig, used: set[str]
) -> tuple[str, ...]:
    """Its captions; notes the sidecars looked at in `used`. Raises CaptionError, _Conflict."""
    beside = tree.sidecars.get(stem(name), {})
    sidecars = [side for kind in caption_types(data) for side in beside.get(kind, [])]
    used.update(sidecars)
    told = [row for row in rows if row.texts is not None or row.problem is not None]
    if len(sidecars) + len(told) > 1:
        captioned = [side for side in sidecars if _has_caption(tree, side)]
        sidecars = captioned if captioned or told else sidecars[:1]
    if sidecars and told:
        if data.caption_source == "error":
            raise _Conflict(f"{_base(sidecars[0])} and {told[0].where}")
        sidecars, told = (sidecars, []) if data.caption_source == "sidecar" else ([], told)
    if len(sidecars) > 1:
        raise _Conflict(" and ".join(_base(side) for side in sidecars[:2]))
    if len(told) > 1:
        raise _Conflict(" and ".join(row.where for row in told[:2]))
    if told:
        if told[0].problem is not None:
            raise told[0].problem
        return finish_captions(told[0].texts or [], data)
    if sidecars:
        return read_sidecar(file_type(sidecars[0]), _read(tree, sidecars[0]), data)
    wanted = ", ".join(f"{_base(stem(name))}.{kind}" for kind in caption_types(data))
    if rows:
        raise CaptionError("caption_missing", f"{rows[0].where} has no caption; no {wanted}")
    raise CaptionError("caption_missing", f"no {wanted}")


def _has_caption(tree: Tree, name: str) -> bool:
    """Whether a sidecar is one: a .json beside another source may hold other things."""
    if file_type(name) != "json":
        return True
    try:
        json_texts(_read(tree, name))
    except CaptionError as error:
        return error.reason != "caption_missing"
    return True


def _read(tree: Tree, name: str) -> bytes:
    """A caption file. Raises CaptionError."""
    base = _base(name)
    if name in tree.refused:
        reason, detail = tree.refused[name]
        raise CaptionError(reason, f"its caption {base}: {detail}")
    try:
        with open_regular(tree.root / name) as file:
            return file.read(CAPTION_MAX_BYTES + 1)
    except OSError as error:
        raise CaptionError("unreadable", f"its caption {base}: {error.strerror}") from None


def _base(name: str) -> str:
    return json_name(os.path.basename(name))


def _group(name: str) -> str:
    """The first folder of a relative name; "" for a file in the root."""
    first, slash, _ = name.partition("/")
    return json_name(first) if slash else ""


def _ignored(tree: Tree, used: set[str]) -> Counter[str]:
    ignored = Counter(tree.ignored)
    for kinds in tree.sidecars.values():
        for kind, names in kinds.items():
            unused = sum(name not in used for name in names)
            if unused:
                ignored[f".{kind} files that caption no image"] += unused
    return ignored


def _refuse_conflicts(conflicts: list[str]) -> None:
    if not conflicts:
        return
    more = len(conflicts) - CONFLICTS_SHOWN
    shown = "; ".join(conflicts[:CONFLICTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise InputError(
        f"captions from two sources for {len(conflicts)} of the images: {shown}. Choose with "
        "data_config.caption_source (sidecar or metadata) or data_config.caption_type (txt, "
        "caption or json), or remove one"
    )


def _nothing_found(dataset: Path, ignored: dict[str, int]) -> str:
    found = ", ".join(f"{count} {kind}" for kind, count in ignored.items())
    if ".safetensors files in tars" in ignored:
        return f"dataset {dataset} is a finished shard set; it goes to `qwen-lora train`"
    return (
        f"dataset {dataset} holds no image; it holds {found or 'nothing'}. Images are JPEG, PNG, "
        "WebP, BMP, TIFF, AVIF or HEIC files, or WebDataset .tar files of them"
    )


def _hints(scan: Scan, data: DataConfig) -> list[str]:
    hints = []
    groups = sorted({candidate.group for candidate in scan.candidates})
    kohya = [group for group in groups if parse_kohya(group) is not None]
    if kohya and not data.kohya_repeats:
        hints.append(
            f"folders named like Kohya's repeats ({', '.join(kohya[:3])}) have weight 1; set "
            "data_config.kohya_repeats: true to take the number as the weight"
        )
    missing = sum(skip.reason == "caption_missing" for skip in scan.skips)
    if missing and not scan.candidates:
        kinds = " ".join(f".{kind}" for kind in caption_types(data))
        hints.append(
            f"no image has a caption; looked for files of the same name with {kinds} "
            f"(data_config.caption_type: {data.caption_type}) and for {', '.join(METADATA_NAMES)}"
        )
    damaged = [skip.name for skip in scan.skips if skip.reason == "tar_damaged"]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        hints.append(
            f"damaged or cut off: {', '.join(damaged[:3])}{more}; what lies behind the damage is "
            "missing and cannot be counted"
        )
    if any(skip.reason == "heif_missing" for skip in scan.skips):
        hints.append("HEIC images were skipped; pip install 'qwen-lora[heif]' reads them")
    return hints
