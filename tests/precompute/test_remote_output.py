"""`precompute --output s3://...`: the bytes of a local set, in a bucket and nothing beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from changing_sets import add_image

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.precompute import lead
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.manifest import load_manifest
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote import objects
from qwen_lora.shards.remote.retries import Patience
from qwen_lora.shards.verify import verify
from tests.s3_server import BUCKET, SECRET, Fault, S3Server, s3_stand_in

HASTE = Patience(attempts=5, first_wait_s=0.001, longest_wait_s=0.01, stall_s=5.0)
Published = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_stand_in() as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.faults.clear()
    s3.requests.clear()
    opened = objects.open_object_remote
    monkeypatch.setattr(objects, "open_object_remote", lambda url: opened(url, HASTE))


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A folder of the bucket that nobody else uses."""
    return f"{tmp_path.name}/set"


@pytest.fixture
def far(make_settings, prefix: str, tmp_path: Path) -> Callable[..., Settings]:
    """As `make_settings`, for a set in the bucket with its state in `state`."""

    def make(data: dict | None = None, state: str = "state", **changes: object) -> Settings:
        place = {"shards_dir": f"s3://{BUCKET}/{prefix}/", "state_dir": tmp_path / state}
        return make_settings(data, **{**place, **changes})

    return make


def changes(s3: S3Server) -> list[str]:
    """The requests that made or removed an object, since they were last looked at."""
    done = [
        request
        for request in s3.requests
        if request.startswith(("PUT", "DELETE")) and "uploadId=" not in request
    ]
    s3.requests.clear()
    return done


# ---- a set like a local one ----------------------------------------------------------------------


def test_a_bucket_gets_the_files_of_a_folder(
    s3: S3Server, prefix, far, make_settings, published: Published, no_encoders, tmp_path, capsys
) -> None:
    local = precompute(make_settings())
    files = published(tmp_path / "shards")
    dry = precompute(far(), dry_run=True)
    assert (dry.samples_written, s3.keys(prefix), changes(s3)) == (12, [], [])
    assert not (tmp_path / "state").exists()
    summary = precompute(far())
    assert s3.objects(prefix) == files
    assert {*summary.lines()} == {*local.lines()}
    kept = {path.name for path in (tmp_path / "state").iterdir()}
    assert kept == {path.name for path in (tmp_path / "shards" / ".local").iterdir()}
    assert s3.uploads() == 0 and len(changes(s3)) == len(files)

    no_encoders()
    for state in ("state", "another machine"):
        again = precompute(far(state=state))
        assert (again.unchanged, again.samples_written, again.manifest) == (
            12,
            0,
            summary.manifest,
        )
    assert changes(s3) == [] and s3.objects(prefix) == files
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and "AKIA" not in said.out + said.err
    for path in (tmp_path / "state").iterdir():
        assert SECRET.encode() not in path.read_bytes()


def test_a_changed_dataset_costs_its_changes(
    s3: S3Server, prefix, far, make_settings, dataset: Path, published: Published, tmp_path
) -> None:
    """Step by step what a local set becomes, whose rules are the same."""
    for name in ("03.png", "03.txt"):
        shutil.move(dataset / name, tmp_path)
    data = {"img_dir": dataset}
    place = tmp_path / "shards"
    for step in ("new", "an image more", "an image less"):
        if step == "an image more":
            for name in ("03.png", "03.txt"):
                shutil.copy(tmp_path / name, dataset)
        elif step == "an image less":
            (dataset / "00.png").unlink()
            with pytest.raises(InputError, match=r"would retire 1 of 4 samples.*add --yes"):
                precompute(far(data), sync=True)
        sync = step == "an image less"
        mine = precompute(make_settings(data), sync=sync, yes=sync)
        s3.requests.clear()
        theirs = precompute(far(data, state=step), sync=sync, yes=sync)  # each on a new machine
        assert (theirs.samples_written, theirs.retired) == (mine.samples_written, mine.retired)
        assert s3.objects(prefix) == published(place), step
        if step != "new":
            tars = [each for each in changes(s3) if each.startswith("PUT") and ".tar" in each]
            assert len(tars) == theirs.samples_written == (0 if sync else 1)
    with pytest.raises(InputError, match=rf"s3://{BUCKET}/{prefix} was made with other encoders"):
        precompute(far(data, text_encoder_dtype="float32"))
    assert s3.objects(prefix) == published(place)
