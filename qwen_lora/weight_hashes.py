"""Which weights a folder has: sha256 of each file, of which most need not be read for it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from threading import Event, Lock
from typing import Any

from qwen_lora.cache_folder import cache_folder
from qwen_lora.errors import InputError
from qwen_lora.hashing import canonical_json, sha256_file
from qwen_lora.models import weight_files
from qwen_lora.posix import read_own, write_atomic
from qwen_lora.progress import Progress

FILE = "weight-hashes.json"
SHOWN_FROM_BYTES = 1 << 30
THREADS = 4  # files at a time
SHA256 = re.compile(r"[0-9a-f]{64}")
LINKS_MAX = 8  # from a file of a snapshot to its blob; the cache itself may be linked to


def weight_hashes(weights: Path, also: Path | None = None) -> dict[str, str]:
    """File name -> sha256 of each weight file of a component: its folder, or one file.

    Files in the hub cache are links to blobs named by their sha256, which are not read. Others are
    hashed once: the result is remembered by path, size, mtime and inode in the user's cache folder,
    and in the file `also`, which may lie where the next machine finds it.
    Raises InputError for one that cannot be read.
    """
    paths = weight_files(weights)
    memory = _Memory([cache_folder(FILE), *([also] if also else [])])
    hashes, stamps = dict[str, str | None](), dict[Path, list[int]]()
    for path in paths:
        hashes[path.name] = hub_sha256(path)
        if hashes[path.name] is None:
            with _readable(path):
                state = path.stat()
            stamp = stamps[path] = [state.st_size, state.st_mtime_ns, state.st_ino]
            hashes[path.name] = memory.recall(path, stamp)
    with closing(_hash_all([path for path in stamps if hashes[path.name] is None])) as results:
        for path, found in results:
            hashes[path.name] = found
            memory.keep(path, stamps[path], found)  # at once: the next one may take minutes
    return {name: found for name, found in hashes.items() if found is not None}


def _hash_all(paths: Sequence[Path]) -> Generator[tuple[Path, str]]:
    """A few files at a time, with a progress bar for what takes more than a moment."""
    if not paths:
        return
    with _readable(paths[0]):
        size = sum(path.stat().st_size for path in paths)
    quiet = size < SHOWN_FROM_BYTES or os.environ.get("LOCAL_RANK", "0") != "0"
    what = paths[0].name if len(paths) == 1 else f"{len(paths)} files of {paths[0].parent.name}"
    lock, pool, stopping = Lock(), ThreadPoolExecutor(THREADS), Event()
    with Progress(f"hashing {what}", size >> 20, "MiB", quiet=quiet) as progress:

        def count(size: int) -> None:
            if stopping.is_set():  # interrupted: a large file is not read to its end
                raise InterruptedError
            with lock:
                progress.update(size >> 20)

        try:
            results = [pool.submit(sha256_file, path, count) for path in paths]
            for path, result in zip(paths, results, strict=True):
                with _readable(path):
                    found = result.result()
                yield path, found
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)


class _Memory:
    """Files of path -> [size, mtime_ns, inode, sha256], all with the same entries."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def recall(self, path: Path, stamp: list[int]) -> str | None:
        """What one of them knows all know from then on."""
        name = str(path.resolve())
        for file in self._files:
            if (entry := _load(file).get(name)) and entry[:3] == stamp:
                self.keep(path, stamp, str(entry[3]))
                return str(entry[3])
        return None

    def keep(self, path: Path, stamp: list[int], found: str) -> None:
        name, entry = str(path.resolve()), [*stamp, found]
        for file in self._files:
            entries = _load(file)  # other runs may have written meanwhile
            if entries.get(name) == entry:
                continue
            entries[name] = entry
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, canonical_json(entries))
            except OSError as error:
                _warn_once(file, error.strerror or str(error))


@cache
def _warn_once(file: Path, reason: str) -> None:
    print(f"warning: {file} cannot be written ({reason}): hashes are made again", file=sys.stderr)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _load(file: Path) -> dict[str, list[Any]]:
    """One that cannot be read counts as empty: weights are then hashed again."""
    try:
        value = json.loads(read_own(file))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        str(key): entry
        for key, entry in value.items()
        if isinstance(entry, list) and len(entry) == 4 and SHA256.fullmatch(str(entry[3]))
    }


def hub_sha256(path: Path) -> str | None:
    """The sha256 by which the hub cache names a file's content; None for any other file.

    snapshots/<commit>/<file> links to models--<owner>--<name>/blobs/<etag>, and the etag of a file
    in Git LFS, as weights are, is its sha256 (of others a Git id, 40 digits). That blob may in turn
    link to <cache>/blobs/<xx>/<hash>, shared between repositories and named by Xet's own hash,
    which is no sha256: so links are followed one by one.
    Source: huggingface_hub, "Understand caching" and `file_download._create_symlink`.
    """
    for _ in range(LINKS_MAX):
        blobs = path.parent
        if blobs.name == "blobs" and blobs.parent.name.startswith("models--"):
            return path.name if SHA256.fullmatch(path.name) else None
        if not path.is_symlink():
            return None
        path = Path(os.path.normpath(blobs.resolve() / os.readlink(path)))
    return None
