"""`qwen-lora shards ...` on web servers and in object stores: what it says and does of a folder."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen_lora.cli import app
from qwen_lora.errors import InputError
from qwen_lora.shards.format import Fingerprint
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.merge import merge
from qwen_lora.shards.prune import prune
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote import objects
from qwen_lora.shards.remote.retries import Patience
from tests.s3_server import BUCKET, Fault, S3Server, s3_stand_in

from .conftest import FINGERPRINT
from .fault_server import FaultServer, serve
from .test_merge import change, files, make_set
from .test_prune import grown_set

pytestmark = [  # of webdataset, which writes the sets here
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GOLDEN = Path(__file__).parent / "golden" / "1.0"
HASTE = Patience(attempts=3, first_wait_s=0.001, longest_wait_s=0.01, stall_s=5.0)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_stand_in() as server:
        yield server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FaultServer]:
    """A web server over the golden set."""
    with serve(shutil.copytree(GOLDEN, tmp_path / "web")) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached, nothing is left in the bucket."""
    s3.faults.clear()
    for key in s3.keys("set/") + s3.keys("out/"):
        s3.delete(key)
    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path / "cache"))
    opened = objects.open_object_remote
    monkeypatch.setattr(objects, "open_object_remote", lambda url: opened(url, HASTE))


def upload(s3: S3Server, folder: Path, prefix: str = "set") -> str:
    for name, data in files(folder).items():
        s3.put(f"{prefix}/{name}", data)
    return f"s3://{BUCKET}/{prefix}"


def says(code: int, *words: str | Path) -> str:
    result = CliRunner().invoke(app, ["shards", *map(str, words)])
    assert result.exit_code == code, result.output
    assert code == 0 or result.output.count("error: ") <= 1
    return result.stdout if code == 0 else result.output


def written(s3: S3Server) -> list[str]:
    """Names of the objects that were made or removed since the last call."""
    done = [each for each in s3.requests if each.startswith(("PUT", "DELETE", "POST"))]
    s3.requests.clear()
    return sorted(each.split()[1].partition("?")[0].rpartition("/")[2] for each in done)


# ---- looking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_looking_at_a_set(s3: S3Server, web: FaultServer, tmp_path: Path, kind: str) -> None:
    url = upload(s3, GOLDEN) if kind == "s3" else web.url
    s3.requests.clear()
    for words in (
        ("info",),
        ("info", "--json"),
        ("list", "--json"),
        ("list", "--urls"),
        ("verify", "--deep", "--json"),
    ):
        there, here = (says(0, words[0], place, *words[1:]) for place in (f"{url}/", GOLDEN))
        assert there.replace(url, str(GOLDEN)) == here, words
    sheets = []
    for place in (url, GOLDEN):
        says(0, "preview", place, "--output", tmp_path / "sheet", "--count", "3")
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1]
    assert written(s3) == []


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_damage_at_the_far_side_is_found(s3: S3Server, web: FaultServer, kind: str) -> None:
    """Copies that were fetched before do not hide it."""
    folder = web.folder
    tar = next(folder.glob("shard-*.tar"))
    url = upload(s3, folder) if kind == "s3" else web.url
    says(0, "list", url)
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    if kind == "s3":
        upload(s3, folder)
    said = says(1, "verify", url)
    assert re.search(rf"problem: .*{tar.name}", said) and "problems" in said
    tar.unlink()
    s3.delete(f"set/{tar.name}")
    assert f"{url}/{tar.name} is missing" in says(1, "verify", url)


@pytest.mark.parametrize("command", ["info", "list", "verify", "preview", "prune"])
def test_no_set_at_a_url(s3: S3Server, web: FaultServer, command: str) -> None:
    url = f"s3://{BUCKET}/set"
    assert f"{url} holds no manifest" in says(2, command, url)
    s3.put("set/shard-0123456789ab.tar", b"x")
    assert f"{url} holds an unfinished precompute" in says(2, command, url)
    for path in web.folder.iterdir():
        path.unlink()
    said = says(2, command, web.url)
    assert ("can only be read" if command == "prune" else "holds no manifest") in said


# ---- merge ---------------------------------------------------------------------------------------


def test_merging_across_places(s3: S3Server, tmp_path: Path) -> None:
    """A folder, a web server and a bucket into a bucket: what the same merge of folders makes."""
    sets = [make_set(tmp_path / name, 4 * n, 6, per_shard=3) for n, name in enumerate("abc")]
    merge(sets, tmp_path / "merged")
    (sets[0] / "notes.txt").write_text("mine")
    url, out = upload(s3, sets[1]), f"s3://{BUCKET}/out"
    s3.requests.clear()
    with serve(sets[2]) as server:
        line = ["merge", sets[0], url, server.url, "--output", f"{out}/"]
        said = says(0, *line)
        made = files(tmp_path / "merged")
        assert s3.objects("out") == made and s3.objects("set") == files(sets[1])
        assert written(s3) == sorted(made)  # each once, and nothing that was taken back
        assert f"{out}: 14 samples, 14 of them new from 3 sets" in said
        assert json.loads(says(0, *line, "--json"))["added"] == 0
    assert written(s3) == []
    assert not list((tmp_path / "cache" / "state").glob("*/*.tmp"))
    assert "can only be read" in says(2, "merge", sets[0], "--output", "http://127.0.0.1:9/set")


def test_appending_to_a_set_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    """Only what is new goes up; other encoders are refused; the output may be named as input."""
    old, new = make_set(tmp_path / "old", 0, 4), make_set(tmp_path / "new", 2, 4)
    out = upload(s3, old, "out")
    merge([new], old)
    s3.requests.clear()
    report = json.loads(says(0, "merge", new, f"{out}/", "--output", out, "--json"))
    assert (report["sets"], report["added"], report["duplicates"]) == (1, 2, 2)
    assert s3.objects("out") == files(old)
    assert load_manifest(out)[0].previous in files(old)
    put = written(s3)
    assert len([name for name in put if name.endswith(".tar")]) == 1 and "manifest.json" in put
    other = Fingerprint("qwen-image", {"weights": ["z"]}, FINGERPRINT.text)
    change(new, fingerprint=other, shards=())
    assert "vae.weights: ['a'] -> ['z']" in says(2, "merge", new, "--output", out)
    assert s3.objects("out") == files(old)


def fail_at_requests(
    s3: S3Server,
    before: dict[str, bytes],
    after: dict[str, bytes],
    words: list[str | Path],
    numbers: Iterable[int],
) -> int:
    """Run a tool on `set` with its n-th request refused, then again without; how often it was.
    The old generation is there until the new one is whole."""
    old = ("manifest.json", before["manifest.json"])
    failed = 0
    for number in numbers:
        for key in s3.keys("set/"):
            s3.delete(key)
        for name, data in before.items():
            s3.put(f"set/{name}", data)
        s3.faults += [*[None] * (number - 1), Fault("status", 409)]
        result = CliRunner().invoke(app, ["shards", *map(str, words)])
        if s3.faults:  # it had fewer requests
            s3.faults.clear()
            continue
        failed += 1
        assert result.exit_code == 1 and result.output.count("error: ") == 1, result.output
        left = s3.objects("set")
        assert left["manifest.json"] in (before["manifest.json"], after["manifest.json"])
        assert left.items() - {old} <= before.items() | after.items()
        shards = load_manifest(f"s3://{BUCKET}/set")[0].shards
        assert {file.name for each in shards for file in (each.tar, each.sidecar)} <= left.keys()
        says(0, *words)
        assert s3.objects("set") == after, number
    return failed


@pytest.fixture
def merging(tmp_path: Path) -> list[Any]:
    """Files of a set before and after, and the command."""
    a, b = make_set(tmp_path / "a", 0, 9, per_shard=8), make_set(tmp_path / "b", 7, 4)
    old = make_set(tmp_path / "old", 3, 2)
    before = files(old)
    merge([a, b], old)
    return [before, files(old), ["merge", a, b, "--output", f"s3://{BUCKET}/set"]]


@pytest.fixture
def pruning(tmp_path: Path) -> list[Any]:
    folder, _ = grown_set(tmp_path / "grown")
    before = files(folder)
    prune(folder, unlisted=True)
    return [before, files(folder), ["prune", f"s3://{BUCKET}/set", "--unlisted"]]


def test_a_merge_or_prune_that_fails(
    s3: S3Server, merging: list[Any], pruning: list[Any], fault_seed: int
) -> None:
    rng = random.Random(fault_seed)
    for job in (merging, pruning):
        assert fail_at_requests(s3, *job, [rng.randrange(2, 13)]) > 0


@pytest.mark.slow
def test_a_merge_or_prune_that_fails_at_any_request(
    s3: S3Server, merging: list[Any], pruning: list[Any]
) -> None:
    failed = [fail_at_requests(s3, *job, range(1, 30)) for job in (merging, pruning)]
    print(f"{failed[0]} merges and {failed[1]} prunes refused at each of their requests")
    assert min(failed) > 10


def test_two_merges_at_once(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one is told to come again, and then nothing is lost."""
    old, a, b = (make_set(tmp_path / name, 3 * n, 3) for n, name in enumerate("oab"))
    url = upload(s3, old, "out")
    put = "PUT /some-bucket/out/manifest.json"
    s3.requests.clear()
    says(0, "merge", a, "--output", url)
    number = next(n for n, each in enumerate(s3.requests) if each.startswith(put))
    for key in s3.keys("out/"):
        s3.delete(key)
    upload(s3, old, "out")
    shutil.rmtree(tmp_path / "cache")

    def another_machine() -> None:
        monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path / "another"))
        merge([b], url)

    s3.faults += [*[None] * number, Fault("call", act=another_machine)]
    said = says(1, "merge", a, "--output", url)
    assert "meanwhile: run the same command again" in said and not s3.faults
    assert len(s3.keys("out/manifest-")) == 2  # the late one took its own away
    says(0, "merge", a, "--output", url)
    with ShardSet.open(url) as shards:
        assert len(shards) == 9


# ---- prune ---------------------------------------------------------------------------------------


def test_pruning_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    """As in a folder; whoever reads the generation before the newest goes on, here and anew."""
    folder, (third, second, first) = grown_set(tmp_path / "set")
    url = upload(s3, folder)
    s3.requests.clear()
    for words in (["--dry-run"], [], ["--all"]):
        far = json.loads(says(0, "prune", url, *words, "--json"))
        near = json.loads(says(0, "prune", folder, *words, "--json"))
        told = "removed_files", "removed_generations", "kept_generations", "retired"
        assert [far[key] for key in told] == [near[key] for key in told]
        assert s3.objects("set") == files(folder), words
        assert written(s3) == [] or "--dry-run" not in words
        if words == []:
            with ShardSet.open(url, generation=third) as pinned:
                assert len([pinned.read_bytes(row) for row in range(len(pinned))]) == 7
            with pytest.raises(InputError, match=f"no generation {second}"):
                ShardSet.open(url, generation=second)
    with pytest.raises(InputError, match=f"no generation {third}"):
        ShardSet.open(url, generation=third)
    says(0, "verify", url, "--deep")


def test_a_run_that_is_pinned_reads_on_while_the_set_is_pruned(
    s3: S3Server, tmp_path: Path
) -> None:
    folder, (third, _, _) = grown_set(tmp_path / "set")
    url = upload(s3, folder)
    with ShardSet.open(url) as pinned:
        pinned.read_bytes(0)
        prune(url)
        assert len([pinned.read_bytes(row) for row in range(len(pinned))]) == 7
        assert pinned.generation == third


def test_pruning_what_can_only_be_read(web: FaultServer) -> None:
    assert f"{web.url} can only be read" in says(2, "prune", web.url)
    assert f"{web.url} can only be read" in says(2, "prune", web.url, "--dry-run")
