"""`--sync`: samples of images that are gone are retired, and never those of a file that failed."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from changing_sets import add_image, watch_encoders
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.reader import ShardSet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of 32 x 32 pixels; two of them in a folder."""
    for index in range(12):
        name = f"more/{index}" if index >= 10 else f"{index}"
        add_image(tmp_path / "images", name, index, f"picture {index}")
    return tmp_path / "images"


@pytest.fixture
def make(make_settings: Callable[..., Settings], folder: Path) -> Callable[..., Settings]:
    def of(data: dict | None = None, **changes: object) -> Settings:
        return make_settings({"img_dir": folder, "img_size": [32], **(data or {})}, **changes)

    return of


def live(folder: Path) -> set[str]:
    with ShardSet.open(folder) as shards:
        return {str(shards.read_meta(row).source) for row in range(len(shards))}


def gone(folder: Path, name: str) -> None:
    (folder / f"{name}.png").unlink()
    (folder / f"{name}.txt").unlink()


def test_a_removed_image_is_retired_at_once(make, folder, capsys, no_encoders, published):
    settings = make()
    precompute(settings)
    gone(folder, "3")
    assert precompute(settings).samples == 12  # without --sync it stays
    tars = {name for name in published(settings.shards_dir) if name.endswith(".tar")}
    no_encoders()
    told = precompute(settings, dry_run=True, sync=True)
    assert (told.samples, told.retired) == (11, 1)
    assert len(live(settings.shards_dir)) == 12
    capsys.readouterr()
    summary = precompute(settings, sync=True)
    assert (summary.seen, summary.unchanged, summary.samples, summary.retired) == (11, 11, 11, 1)
    captured = capsys.readouterr()
    assert "1 of 12 samples have lost their image and are retired" in captured.err
    assert "11 samples in the set, 0 of them new; 1 retired" in captured.out
    assert "3.png" not in live(settings.shards_dir)
    with ShardSet.open(settings.shards_dir) as shards:
        assert (shards.manifest.counts["samples"], shards.manifest.counts["retired"]) == (11, 1)
    files = published(settings.shards_dir)
    assert {name for name in files if name.endswith(".tar")} == tars  # until they are pruned
    assert precompute(settings, sync=True).retired == 0
    assert published(settings.shards_dir) == files
    assert precompute(settings).samples == 11  # what was retired stays so


def test_an_image_that_comes_back_counts_again(make, folder, no_encoders):
    settings = make()
    precompute(settings)
    gone(folder, "3")
    precompute(settings, sync=True)
    add_image(folder, "another name", 3, "picture 3")
    no_encoders()
    summary = precompute(settings, sync=True)
    assert (summary.unchanged, summary.written, summary.samples) == (12, 0, 12)


def test_a_large_removal_has_to_be_confirmed(make, folder, no_encoders, published, capsys):
    settings = make()
    precompute(settings)
    before = published(settings.shards_dir)
    gone(folder, "3")
    gone(folder, "4")
    (folder / "5.txt").write_text("edited meanwhile")
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_encoders(patch)
        with pytest.raises(InputError, match=r"retire 2 of 12 samples \(17 %\).*add --yes"):
            precompute(settings, sync=True)
        assert seen.counts == (0, 0)  # said before anything is encoded
    assert published(settings.shards_dir) == before
    capsys.readouterr()
    precompute(settings, dry_run=True, sync=True)
    assert "2 of 12 samples have lost their image and are retired (needs --yes)" in (
        capsys.readouterr().out
    )
    summary = precompute(settings, sync=True, yes=True)
    assert (summary.samples, summary.retired, summary.written) == (10, 3, 1)
    assert live(settings.shards_dir).isdisjoint({"3.png", "4.png"})


def test_yes_alone_is_refused(make):
    with pytest.raises(InputError, match="--yes has no effect without --sync"):
        precompute(make(), yes=True)


def test_the_command_line_has_it(make, folder, tiny_model):
    settings = make()
    precompute(settings)
    gone(folder, "3")
    gone(folder, "4")
    line = ["precompute", str(folder), "--model", str(tiny_model), "--resolution", "32"]
    line += ["--output", str(settings.shards_dir), "--sync"]
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code == 2 and "add --yes if they are to go" in refused.output
    done = CliRunner().invoke(app, [*line, "--yes"])
    assert done.exit_code == 0, done.output
    assert "10 samples in the set, 0 of them new; 2 retired" in done.output


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def cut_off(path: Path) -> None:
    """Its header is whole: only decoding tells."""
    path.write_bytes(path.read_bytes()[:-40])


def unreadable(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("failure", ["caption", "broken", "cut off", "unreadable"])
def test_a_file_that_failed_keeps_its_samples(make, folder, capsys, failure, memory, names):
    """Image 5 fails while image 3 is gone. Its samples are told by its bytes, or by what this
    machine remembers of it, or by its name; without any of them nothing is retired."""
    settings = make(source_names=names)
    precompute(settings)
    gone(folder, "3")
    if failure == "caption":
        (folder / "5.txt").unlink()
    else:
        damage = {"broken": broken, "cut off": cut_off, "unreadable": unreadable}[failure]
        damage(folder / "5.png")
    if not memory:
        shutil.rmtree(settings.shards_dir / ".local")
    capsys.readouterr()
    summary = precompute(settings, sync=True, yes=True)
    assert summary.skipped == 1
    told = failure == "caption" or memory or names
    assert (summary.samples, summary.retired) == ((11, 1) if told else (12, 0))
    assert ("sync: nothing is retired: 5.png" in capsys.readouterr().err) is not told
    if names:
        assert "5.png" in live(settings.shards_dir)
        assert "3.png" not in live(settings.shards_dir)
    again = precompute(settings, sync=True, yes=True)  # by now the damage is what is remembered
    assert (again.samples, again.retired) == (summary.samples, 0)


def test_what_lies_in_a_tar_that_failed_stays(make, folder):
    with tarfile.open(folder / "packed.tar", "w") as tar:
        for name in ("8.png", "8.txt", "9.png", "9.txt"):
            tar.add(folder / name, name)
            (folder / name).unlink()
    settings = make()
    assert precompute(settings).samples == 12
    gone(folder, "3")
    content = (folder / "packed.tar").read_bytes()
    (folder / "packed.tar").write_bytes(content[: len(content) // 2])
    summary = precompute(settings, sync=True)
    assert (summary.samples, summary.retired) == (11, 1)
    assert "3.png" not in live(settings.shards_dir)


def test_a_row_without_its_image_keeps_nothing(make, folder):
    for path in folder.rglob("*.txt"):
        path.unlink()
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    rows = [f'{{"file_name": "{name}", "text": "picture {name}"}}\n' for name in names]
    (folder / "metadata.jsonl").write_text("".join(rows))
    settings = make()
    assert precompute(settings).samples == 12
    (folder / "3.png").unlink()
    summary = precompute(settings, sync=True)
    assert (summary.reasons, summary.samples) == ({"image_missing": 1}, 11)


def test_a_twin_keeps_the_sample(make, folder, no_encoders):
    shutil.copy2(folder / "3.png", folder / "twin.png")
    (folder / "twin.txt").write_text("picture 3")
    settings = make()
    assert precompute(settings).duplicate == 1
    gone(folder, "3")
    no_encoders()
    summary = precompute(settings, sync=True)
    assert (summary.unchanged, summary.samples, summary.retired) == (12, 12, 0)


@pytest.mark.parametrize("failure", ["gone", "no caption"])
def test_a_twin_with_another_caption_is_a_caption_of_the_same_image(make, folder, failure):
    shutil.copy2(folder / "3.png", folder / "twin.png")
    (folder / "twin.txt").write_text("seen otherwise")
    settings = make()
    assert precompute(settings).samples == 13
    (folder / "twin.txt").unlink()
    if failure == "gone":
        (folder / "twin.png").unlink()
    summary = precompute(settings)
    assert (summary.samples, summary.retired) == (12, 1)
    (folder / "3.txt").write_text("seen otherwise")  # and back by the other file
    assert precompute(settings).samples_written == 0
