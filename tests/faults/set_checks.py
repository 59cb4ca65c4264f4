"""What must hold of a shard set's folder and of a run's checkpoints after any fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fault_points import ForkServer, visible_files


def finished_shards(folder: Path) -> dict[str, int]:
    """Inodes of the shards whose sidecar is there too."""
    return {
        tar.name: tar.stat().st_ino
        for tar in folder.glob("shard-*.tar")
        if tar.with_suffix(".json").exists()
    }


def temporaries(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.rglob("*")
        if path.name.endswith(".tmp") or path.name.startswith((".new-", ".old-"))
    )


def check_set(
    server: ForkServer, folder: Path, unbroken: dict[str, bytes], what: str, job: str = "write_set"
) -> None:
    """No partial file under a final name; a rerun ends as an unbroken run, and keeps every shard
    that was finished."""
    left = visible_files(folder) if folder.exists() else {}
    assert left.items() <= unbroken.items(), f"{what}: a partial file has a final name"
    finished = finished_shards(folder)
    server.run(job, folder)
    assert visible_files(folder) == unbroken, f"{what}: the rerun ended with other bytes"
    assert finished.items() <= finished_shards(folder).items(), (
        f"{what}: a finished shard was made again"
    )
    assert not temporaries(folder), f"{what}: temporaries were left"


def whole_checkpoints(folder: Path, known: dict[str, dict[str, bytes]]) -> set[str]:
    """Names of the checkpoints in a run's folder; each must be one of `known`, byte by byte."""
    found = {}
    for path in (folder / "checkpoints").glob("step-*"):
        found[path.name] = visible_files(path)
    for name, files in found.items():
        assert files == known[name], f"{name} is not whole"
    return set(found)


def check_run(
    server: ForkServer,
    folder: Path,
    known: dict[str, dict[str, bytes]],
    before: set[str],
    what: str,
    **arguments: Any,
) -> None:
    """Every checkpoint is whole, a sound one is always there, and the run goes on from it."""
    left = whole_checkpoints(folder, known) if folder.exists() else set()
    assert left or not before, f"{what}: no checkpoint is left"
    assert not left or max(left) >= max(before, default=""), f"{what}: the newest one is lost"
    server.run("save_checkpoints", folder, **arguments)
    names = [f"step-{step:08d}" for step in arguments["steps"]][-arguments["keep"] :]
    # A run that was killed between a save and its clearing up keeps one checkpoint more.
    assert whole_checkpoints(folder, known) >= set(names), what
    assert not temporaries(folder), f"{what}: temporaries were left"
