"""The guard itself: it stops what it must, and plain webdataset shows that the attacks are real."""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from audit_hook import guarded
from payloads import payload, plain_tar

DEEDS: list[Callable[[Path], object]] = [
    lambda path: exec("1"),
    lambda path: eval("1 + 1"),
    lambda path: pickle.loads(payload(path)),
    lambda path: os.system(f"touch {path}"),
    lambda path: subprocess.run(["touch", path], check=False),
    lambda path: os.execv("/bin/touch", ["touch", str(path)]),
    lambda path: socket.create_connection(("127.0.0.1", 9), timeout=1),
    lambda path: ctypes.CDLL(None),
    lambda path: __import__("this"),
    lambda path: path.write_text("x"),
    lambda path: os.mkdir(path),
    lambda path: os.symlink("x", path),
    lambda path: open("/etc/passwd"),
]


@pytest.mark.parametrize("deed", DEEDS)
def test_a_deed_is_stopped_and_recorded(deed: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "sandbox").mkdir()
    with guarded(tmp_path / "sandbox") as guard:
        deed(tmp_path / "canary")
    assert guard.violations and not (tmp_path / "canary").exists()
    assert "this" not in sys.modules


def test_other_threads_are_watched_too(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def deed() -> None:
        try:
            os.system("true")
        except BaseException as error:
            caught.append(error)

    with guarded(tmp_path) as guard:
        thread = threading.Thread(target=deed)
        thread.start()
        thread.join()
    assert guard.violations and caught


def test_what_is_allowed_goes_on(tmp_path: Path) -> None:
    with guarded(tmp_path) as guard:
        (tmp_path / "file").write_bytes(b"x")
        (tmp_path / "file").rename(tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == b"x"
    assert guard.violations == []
    assert os.system("true") == 0  # and outside nothing is stopped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset
@pytest.mark.parametrize("name", ["x.pyd", "x.pkl", "x.pickle"])
def test_plain_webdataset_runs_the_payload(name: str, tmp_path: Path) -> None:
    """The same tars that tests/attacks feeds to this reader."""
    tar = tmp_path / "a.tar"
    tar.write_bytes(plain_tar([(name, payload(tmp_path / "canary"))]))
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False).decode()
    with guarded(tmp_path) as guard:
        list(dataset)
    assert any("pickle.find_class" in text for text in guard.violations)
