"""What lies in a dataset folder, by kind. Names and lstat only: no file is opened here."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from qwen_lora.errors import InputError
from qwen_lora.precompute.inspect import heif_available
from qwen_lora.precompute.reasons import Reason
from qwen_lora.precompute.types import Skip

IMAGE_TYPES = frozenset("jpg jpeg jpe jfif png webp bmp tif tiff avif heic heif hif".split())
HEIF_TYPES = ("heic", "heif", "hif")
# Pictures by name that no decoder here reads: reported one by one, not ignored.
UNSUPPORTED_TYPES = frozenset(
    "gif apng svg psd psb xcf eps ai pdf ico icns tga dds exr hdr pbm pgm ppm pnm pfm jp2 j2k jpx"
    " jxl jxr wdp raw dng cr2 cr3 nef arw orf rw2 raf srw pef"
    .split()
)  # fmt: skip
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
SIDECAR_TYPES = frozenset(("txt", "caption", "json"))
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "captions.json")
SYSTEM_FOLDERS = frozenset(("@eaDir", "__MACOSX"))
# Links between 20 folders can make a million paths; each folder is listed this often at most.
FOLDER_VISITS_MAX = 32
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))
# Control characters, line separators, and marks that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@dataclass
class Tree:
    """Paths relative to the root, with surrogates for bytes that are no UTF-8."""

    root: Path
    images: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    # "folder/stem" -> type -> name; two files of one type differ in case (a.txt, a.TXT)
    sidecars: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    refused: dict[str, tuple[Reason, str]] = field(default_factory=dict)  # name -> reason, detail
    skips: list[Skip] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def json_name(name: str | bytes) -> str:
    r"""A name as text that JSON and a terminal can hold, different for different names.

    Bytes that are no UTF-8 and control characters become `\xNN`, a backslash becomes two.
    """
    text = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return _CONTROLS.sub(
        lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), text
    )


def file_type(name: str) -> str:
    """The extension in lower case without its dot; "" for none."""
    return os.path.splitext(name)[1][1:].lower()


def type_problem(kind: str) -> tuple[Reason, str] | None:
    """Why no image of this type is read: reason and detail of its Skip; None for other types."""
    if kind in UNSUPPORTED_TYPES:
        return "unsupported_type", f".{kind} files are not read; convert it to PNG, JPEG or WebP"
    if kind in HEIF_TYPES and not heif_available():
        return "heif_missing", "install the extra: pip install 'qwen-lora[heif]'"
    return None


def is_tar(name: str) -> bool:
    """Also for a compressed tar, which is reported and not read."""
    return name.lower().endswith((".tar", *COMPRESSED_TARS))


def stem(name: str) -> str:
    """`folder/a.b` of `folder/a.b.jpg`."""
    return os.path.splitext(name)[0]


def walk(root: Path, follow_symlinks: bool) -> Tree:
    """List the folder and its sub-folders. Raises InputError for one that cannot be read."""
    tree = Tree(root)
    walker = _Walker(tree, os.path.realpath(root), follow_symlinks)
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        pending += walker.list_folder(folder, above)
    return tree


class _Walker:
    def __init__(self, tree: Tree, real_root: str, follow_symlinks: bool) -> None:
        self.tree = tree
        self.real_root = real_root
        self.follow_symlinks = follow_symlinks
        self.visits: Counter[tuple[int, int]] = Counter()  # of folders, by device and inode

    def list_folder(
        self, folder: str, above: frozenset[tuple[int, int]]
    ) -> list[tuple[str, frozenset[tuple[int, int]]]]:
        """File its entries; returns its sub-folders with the identities of the folders above."""
        path = os.path.join(self.tree.root, folder) if folder else str(self.tree.root)
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            shown = json_name(folder) or str(self.tree.root)
            raise InputError(
                f"dataset folder {shown} cannot be read: {error.strerror}; its images would be "
                "missing without a word"
            ) from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            self._skip(folder, "symlink_loop", "the link leads to a folder above it")
            return []
        self.visits[identity] += 1
        if self.visits[identity] > FOLDER_VISITS_MAX:
            detail = f"more than {FOLDER_VISITS_MAX} paths lead to this folder by links"
            self._skip(folder, "symlink_repeated", detail)
            return []
        below = above | {identity}
        folders = []
        for entry in listed:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if self._file(entry, name):
                folders.append((name, below))
        return folders

    def _file(self, entry: os.DirEntry[str], name: str) -> bool:
        """Put one entry where it belongs; whether it is a folder to be walked."""
        if entry.name.startswith("."):
            self.tree.ignored["hidden"] += 1
            return False
        if entry.name in SYSTEM_FOLDERS or entry.name.lower() in SYSTEM_FILES:
            self.tree.ignored["system files"] += 1
            return False
        try:
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                problem = self._check_link(entry.path)
                if problem is not None:
                    self._refuse(name, *problem)
                    return False
                mode = os.stat(entry.path).st_mode
        except OSError as error:  # gone, or replaced, since the folder was listed
            self._refuse(name, "unreadable", error.strerror or type(error).__name__)
            return False
        if stat.S_ISDIR(mode):
            if file_type(name) in IMAGE_TYPES:
                self._skip(name, "not_a_file", "a folder with the name of a file")
            return True
        if not stat.S_ISREG(mode):
            self._refuse(name, "not_a_file", _kind(mode))
            return False
        self._sort_in(entry.name, name)
        return False

    def _check_link(self, path: str) -> tuple[Reason, str] | None:
        try:
            target = os.path.realpath(path, strict=True)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                return "symlink_dangling", "the link leads to nothing"
            return "symlink_loop", error.strerror or "the link cannot be followed"
        inside = target == self.real_root or target.startswith(
            self.real_root.rstrip(os.sep) + os.sep
        )
        if inside or self.follow_symlinks:
            return None
        return (
            "symlink_outside",
            "the link leads out of the dataset; set data_config.follow_symlinks: true to follow it",
        )

    def _sort_in(self, base: str, name: str) -> None:
        kind = file_type(base)
        problem = type_problem(kind)
        if problem is not None:
            self._skip(name, *problem)
        elif kind in IMAGE_TYPES:
            self.tree.images.append(name)
        elif base in METADATA_NAMES:
            self.tree.metadata.append(name)
        elif is_tar(base):
            self.tree.tars.append(name)
        elif kind in SIDECAR_TYPES:
            self.tree.sidecars.setdefault(stem(name), {}).setdefault(kind, []).append(name)
        else:
            self.tree.ignored[f".{kind} files" if kind else "files without an extension"] += 1

    def _refuse(self, name: str, reason: Reason, detail: str) -> None:
        """A file that is not opened; a sidecar is reported with its image."""
        kind = file_type(name)
        if os.path.basename(name) in METADATA_NAMES:
            raise InputError(f"{json_name(name)} cannot be read: {reason}: {detail}")
        if kind in SIDECAR_TYPES:
            self.tree.refused[name] = (reason, detail)
            self.tree.sidecars.setdefault(stem(name), {}).setdefault(kind, []).append(name)
        elif kind in IMAGE_TYPES or is_tar(name) or os.path.isdir(self.tree.root / name):
            self._skip(name, reason, detail)
        else:
            self.tree.ignored["links and special files"] += 1

    def _skip(self, name: str, reason: Reason, detail: str) -> None:
        self.tree.skips.append(Skip(json_name(name), reason, detail))


def _kind(mode: int) -> str:
    for test, word in (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISDIR, "a folder"),
    ):
        if test(mode):
            return word
    return "not a regular file"
