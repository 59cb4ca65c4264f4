"""sha256 of weight files: read once, by whoever needs them first, and remembered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Barrier
from time import sleep

import pytest

from qwen_lora import weight_hashes as module
from qwen_lora.errors import InputError
from qwen_lora.hashing import sha256_file
from qwen_lora.weight_hashes import FILE, weight_hashes


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder of this test's own."""
    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def test_weights_that_cannot_be_read(tiny_model: Path, monkeypatch) -> None:
    def denied(path: Path, on_bytes: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "sha256_file", denied)
    with pytest.raises(InputError, match="safetensors cannot be read: Permission denied"):
        weight_hashes(tiny_model / "vae")


def test_they_are_remembered_until_the_file_changes(
    tiny_model: Path, tmp_path, home: Path, monkeypatch
):
    folder = shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    cache = tmp_path / "state" / "hashes.json"
    read: list[Path] = []
    monkeypatch.setattr(
        module, "sha256_file", lambda path, on_bytes: read.append(path) or sha256_file(path)
    )
    first = weight_hashes(folder, cache)
    (name,) = first
    assert first == {name: sha256_file(folder / name)} and len(read) == 1
    assert weight_hashes(folder, cache) == first and len(read) == 1
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    changed = weight_hashes(folder, cache)
    assert changed == {name: sha256_file(folder / name)} != first and len(read) == 2
    for file in (cache, home / FILE):
        file.write_text("{broken")
    assert weight_hashes(folder, cache) == changed and len(read) == 3


def test_hashing_a_large_file_shows_that_something_happens(
    tmp_path: Path, home: Path, monkeypatch, capsys
):
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    weight_hashes(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "SHOWN_FROM_BYTES", 1 << 20)
    shutil.rmtree(home)
    weight_hashes(tmp_path)
    assert "hashing model.safetensors: 3/3 MiB" in capsys.readouterr().err


def test_they_are_remembered_where_the_next_machine_looks(
    tiny_model: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder on a volume, and a cache folder that is new each time."""
    expected = weight_hashes(tiny_model / "vae")
    monkeypatch.setattr(module, "sha256_file", None)  # a call would raise
    kept = tmp_path / "run" / FILE
    assert weight_hashes(tiny_model / "vae", kept) == expected
    shutil.rmtree(home)
    assert weight_hashes(tiny_model / "vae", kept) == expected
    kept.unlink()
    assert weight_hashes(tiny_model / "vae") == expected


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.write_text("no folder")
    first = weight_hashes(tiny_model / "vae")
    assert weight_hashes(tiny_model / "vae") == first
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_several_files_are_hashed_at_a_time(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    names = [f"part-{number}.safetensors" for number in range(9)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number]) * (1 << 20))
    index = {"weight_map": {str(number): name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    meeting = Barrier(2)

    def meet(path: Path, on_bytes: Callable[[int], None]) -> str:
        if path.name in names[:2]:
            meeting.wait(60)
        return sha256_file(path, on_bytes)

    monkeypatch.setattr(module, "sha256_file", meet)
    monkeypatch.setattr(module, "SHOWN_FROM_BYTES", 1 << 20)
    assert weight_hashes(folder) == {name: sha256_file(folder / name) for name in names}
    assert "hashing 9 files of transformer: 9/9 MiB" in capsys.readouterr().err


def test_an_interrupt_waits_for_no_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(10))

    stopped = []

    def long(path: Path, on_bytes: Callable[[int], None]) -> str:
        try:
            for _ in range(6000):
                sleep(0.01)
                on_bytes(0)
        except OSError as error:
            stopped.append(error)
            raise
        return ""

    monkeypatch.setattr(module, "sha256_file", long)
    monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weight_hashes(tmp_path)
    assert stopped


def interrupt(self: object) -> None:
    raise KeyboardInterrupt


def test_two_runs_at_once_both_remember(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """The other one writes while this one hashes."""
    first = weight_hashes(tiny_model / "vae")
    (tmp_path / "home" / FILE).unlink()

    def meanwhile(path: Path, on_bytes: Callable[[int], None]) -> str:
        if path.parent.name == "transformer":
            assert weight_hashes(tiny_model / "vae") == first
        return sha256_file(path, on_bytes)

    monkeypatch.setattr(module, "sha256_file", meanwhile)
    second = weight_hashes(tiny_model / "transformer")
    monkeypatch.setattr(module, "sha256_file", None)
    assert weight_hashes(tiny_model / "vae") == first
    assert weight_hashes(tiny_model / "transformer") == second
