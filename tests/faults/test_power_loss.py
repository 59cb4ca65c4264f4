"""A power loss keeps what was made durable: the order of writes, fsyncs and renames in a trace."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from fault_points import ForkServer, Point, points_of

pytestmark = pytest.mark.multiprocess
_OPENED = re.compile(r"\d+<([^>]*)>")
_QUOTED = re.compile(r'"([^"]*)"')


def check_order(points: Sequence[Point], last: str = "") -> None:
    """Content is synced before its name is given, names before whatever counts on them, and at the
    end nothing waits. `last`: a name that is only given when all others are durable."""
    written: set[str] = set()  # files with content that a power loss would take
    named: set[str] = set()  # folders with names that a power loss would take
    for point in points:
        if " = -1 " in point.line:
            continue
        opened = _OPENED.match(point.line)
        names = _QUOTED.findall(point.line)
        if point.call in ("write", "pwrite64", "sendfile"):
            assert opened is not None
            written.add(opened[1])
        elif point.call in ("fsync", "fdatasync"):
            assert opened is not None
            written.discard(opened[1])
            named.discard(opened[1] or "/")
        elif point.call in ("rename", "renameat", "renameat2"):
            source, target = names[:2]
            inside = {path for path in written | named if f"{path}/".startswith(f"{source}/")}
            assert not inside, f"{point}: named before {inside} is durable"
            if last and os.path.basename(target) == last:
                waiting = {path for path in named if not path.endswith("/.local")}
                assert not waiting, f"{point}: {waiting} may still lose names"
            named.add(os.path.dirname(target))
        elif point.call in ("openat", "mkdir", "mkdirat"):
            named.add(os.path.dirname(names[0]))
    lasting = {path for path in written if not path.endswith(("/lock", ".tmp"))}
    temporary = {path for path in named if path.endswith("/.local")}
    assert not lasting and not named - temporary, f"at the end: {lasting}, {named}"


def test_a_set_is_durable_before_its_manifest(server: ForkServer, tmp_path: Path) -> None:
    if not server.traces:
        pytest.skip("needs strace")
    points = points_of(server, "write_set", tmp_path / "made" / "set", within=tmp_path)
    assert sum(point.call == "rename" for point in points) == 11
    check_order(points, last="manifest.json")


def test_a_checkpoint_is_durable_when_it_has_its_name(server: ForkServer, tmp_path: Path) -> None:
    if not server.traces:
        pytest.skip("needs strace")
    facts = {"steps": [10, 20], "keep": 2}
    points = points_of(server, "save_checkpoints", tmp_path / "made", within=tmp_path, **facts)
    assert sum(point.call == "rename" for point in points) == 2
    check_order(points)


@pytest.mark.parametrize("missing", ["fsync of a file", "fsync of a folder"])
def test_a_missing_fsync_is_noticed(server: ForkServer, tmp_path: Path, missing: str) -> None:
    """The check itself, on the same traces with one line left out."""
    if not server.traces:
        pytest.skip("needs strace")
    points = points_of(server, "write_set", tmp_path / "made" / "set", within=tmp_path)
    kind = ".tmp>" if missing.endswith("file") else "set>"
    chosen = [point for point in points if point.call == "fsync" and kind in point.line]
    assert len(chosen) >= 10
    # A later fsync of the folder covers an earlier one, up to the manifest's turn.
    for point in chosen if missing.endswith("file") else chosen[-2:]:
        with pytest.raises(AssertionError):
            check_order([other for other in points if other is not point], last="manifest.json")
