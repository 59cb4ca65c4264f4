"""`qwen-lora shards` as it is typed: what is printed, in which form, with which exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qwen_lora.cli import app
from qwen_lora.cli.shards import _line
from qwen_lora.shards.format import FORMAT_MAJOR
from qwen_lora.shards.reader import ShardSet

GOLDEN = Path(__file__).parent / "shards" / "golden" / "1.0"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["shards", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of four live samples and a retired one, in two generations."""
    shutil.copytree(GOLDEN, tmp_path / "set")
    return tmp_path / "set"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_info_and_list_say_the_same(folder: Path) -> None:
    facts = json.loads(invoke("info", folder, "--json").stdout)
    samples = [json.loads(line) for line in invoke("list", folder, "--json").stdout.splitlines()]
    assert facts["counts"]["samples"] == len(samples) == 4
    assert facts["counts"]["captions"] == sum(len(each["captions"]) for each in samples)
    buckets = [f"{each['bucket'][0]}x{each['bucket'][1]}" for each in samples]
    assert facts["histograms"]["buckets"] == {name: buckets.count(name) for name in set(buckets)}
    told, lines = invoke("info", folder).stdout, invoke("list", folder).stdout.splitlines()
    for fact in ("samples      4 of", "fingerprint ", "tokens ", "made by ", "MiB in 2 shards"):
        assert fact in told
    assert [line.split()[0] for line in lines] == [each["sample_id"] for each in samples]
    urls = invoke("list", folder, "--urls").stdout.splitlines()
    assert urls == [str(path) for path in sorted(folder.glob("*.tar"))]


def test_verify_has_an_exit_code_for_each_outcome(folder: Path) -> None:
    sound = invoke("verify", folder, "--deep")
    assert sound.exit_code == 0 and sound.stdout.startswith("intact: ")
    tar = sorted(folder.glob("*.tar"))[0]
    tar.unlink()
    damaged = invoke("verify", folder)
    assert damaged.exit_code == 1
    assert damaged.stdout.splitlines()[0].startswith(f"problem: {tar} is missing")
    facts = json.loads(invoke("verify", folder, "--json").stdout)
    assert not facts["ok"] and len(facts["problems"]) == 1
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["format_major"] = FORMAT_MAJOR + 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    newer = invoke("verify", folder)
    assert newer.exit_code == 2
    assert newer.stderr.startswith("error: ") and "newer qwen-lora" in newer.stderr
    assert invoke("verify", folder / "nothing").exit_code == 2


@pytest.mark.parametrize("strip", ["", ",", " , "])
def test_an_empty_strip_publishes_nothing(strip: str, folder: Path, tmp_path: Path) -> None:
    """`--strip "$WHAT"` with a variable that is not set must not keep the captions."""
    result = invoke("merge", folder, "--output", tmp_path / "public", "--strip", strip)
    assert result.exit_code == 2 and "names nothing to leave out" in result.stderr
    assert not (tmp_path / "public").exists()


def test_merge_tells_what_it_left_out(folder: Path, tmp_path: Path) -> None:
    result = invoke("merge", folder, folder, "--output", tmp_path / "all")
    assert result.exit_code == 0, result.output
    assert "4 samples, 4 of them new from 2 sets" in result.stdout
    assert "4 duplicates and 2 retired samples left out" in result.stdout
    public = tmp_path / "public"
    result = invoke("merge", folder, "--output", public, "--strip", "captions,source", "--json")
    assert json.loads(result.stdout)["stripped"] == ["captions", "source"]
    with ShardSet.open(public) as shards:
        metas = [shards.read_meta(row) for row in range(len(shards))]
    assert {(meta.captions, meta.source) for meta in metas} == {(None, None)}
    assert "(no captions stored)" in invoke("list", public).stdout


def test_prune_says_first_and_does_then(folder: Path) -> None:
    before = names(folder)
    told = invoke("prune", folder, "--dry-run", "--all")
    assert told.exit_code == 0 and "1 retired samples would be left out" in told.stdout
    assert names(folder) == before
    done = json.loads(invoke("prune", folder, "--all", "--json").stdout)
    assert done["retired"] == 1 and set(done["removed_files"]) <= set(before)
    assert invoke("verify", folder, "--deep").exit_code == 0
    assert json.loads(invoke("info", folder, "--json").stdout)["counts"]["retired"] == 0


def test_texts_of_others_do_not_steer_the_terminal() -> None:
    sample = {
        "sample_id": "0" * 32,
        "bucket": [64, 64],
        "token_counts": [3],
        "captions": ["a\x1b[31mred\n\u202efdp.exe\x07"],
        "source": "b\x1b]0;title.png",
        "source_sha256": "0" * 64,
    }
    line = _line(sample)
    assert line.isprintable()
    assert r"a\x1b[31mred\n\u202efdp.exe\x07" in line and r"b\x1b]0;title.png" in line


def test_the_tools_import_no_torch(folder: Path, tmp_path: Path) -> None:
    """They answer at once, on machines without it too."""
    code = """
import sys
from typer.testing import CliRunner
from qwen_lora.cli import app
folder, output = sys.argv[1:]
for line in (
    ["--help"], ["shards", "info", folder], ["shards", "list", folder],
    ["shards", "verify", folder, "--deep"], ["shards", "preview", folder, "--output", output],
    ["shards", "merge", folder, "--output", output], ["shards", "prune", output],
):
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (line, result.output)
    found = {"torch", "webdataset", "diffusers", "transformers"} & sys.modules.keys()
    assert not found, (line, found)
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
