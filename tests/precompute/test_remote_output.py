"""`precompute --output s3://...`: the bytes of a local set, in a bucket and nothing beside them."""

from __future__ import annotations

import random
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
    begun = s3.uploads()
    dry = precompute(far(), dry_run=True)
    assert (dry.samples_written, s3.keys(prefix), changes(s3)) == (12, [], [])
    assert not (tmp_path / "state").exists()
    summary = precompute(far())
    assert s3.objects(prefix) == files
    assert {*summary.lines()} == {*local.lines()}
    kept = {path.name for path in (tmp_path / "state").iterdir()}
    assert kept == {path.name for path in (tmp_path / "shards" / ".local").iterdir()}
    assert s3.uploads() == begun and len(changes(s3)) == len(files)

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


def test_what_a_stopped_run_left_is_taken_up_if_it_is_whole(
    s3: S3Server, prefix, far, make_settings, published: Published, tmp_path, capsys
) -> None:
    """Of three shards one is whole, one is damaged, and one lacks its sidecar."""
    data = {"img_dir": folder_of(tmp_path, "images", range(6)), "img_size": [32]}
    precompute(make_settings(data, shard_max_samples=2))
    files = published(tmp_path / "shards")
    whole, damaged, lone = sorted(name for name in files if name.endswith(".tar"))
    for name in (whole, damaged, lone):
        s3.put(f"{prefix}/{name}", files[name])
    flipped = bytearray(files[damaged])
    flipped[700] ^= 1
    s3.put(f"{prefix}/{damaged}", bytes(flipped))
    for name in (whole, damaged):
        sidecar = name.replace(".tar", ".json")
        s3.put(f"{prefix}/{sidecar}", files[sidecar])
    capsys.readouterr()
    s3.requests.clear()
    precompute(far(data, shard_max_samples=2))
    assert s3.objects(prefix) == files
    assert not [each for each in changes(s3) if whole in each]
    assert "encoding: 4/4 samples" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_stores_of_fsspec(
    far, make_settings, published: Published, tmp_path, protocol: str
) -> None:
    import fsspec

    data = {"img_dir": folder_of(tmp_path, "images", range(3)), "img_size": [32]}
    precompute(make_settings(data))
    place = f"{protocol}://{tmp_path}/elsewhere"
    for count in (3, 0):
        assert precompute(far(data, shards_dir=place)).samples_written == count
        store = fsspec.filesystem(protocol)
        kept = {Path(name).name: store.cat_file(name) for name in store.find(place)}
        assert kept == published(tmp_path / "shards")


# ---- two runs at once ----------------------------------------------------------------------------


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch):
    """`meanwhile(act)`: right before the next generation is published, `act` is called."""

    def arrange(act: Callable[[], object]) -> None:
        publish = lead.publish_manifest

        def late(*arguments: object) -> str:
            monkeypatch.setattr(lead, "publish_manifest", publish)
            act()
            return publish(*arguments)

        monkeypatch.setattr(lead, "publish_manifest", late)

    return arrange


def check_whole(url: str, sources: set[str], history: bool = True) -> None:
    """The set holds one sample of each source, every byte of it is right, and all its earlier
    generations are there."""
    report = verify(url, deep=True)
    assert report.problems == [] and report.samples == len(sources)
    with ShardSet.open(url) as shards:
        assert {shards.read_meta(row).source for row in range(len(shards))} == sources
        name = shards.manifest.previous if history else None
        while name is not None:
            manifest, _ = load_manifest(shards.store, name)
            name = manifest.previous


def folder_of(tmp_path: Path, name: str, numbers: range) -> Path:
    for number in numbers:
        add_image(tmp_path / name, f"{number}", number, f"picture {number}", side=32)
    return tmp_path / name


@pytest.mark.parametrize("theirs", [range(3, 9), range(1, 2)])
def test_two_datasets_at_once_become_one_set(
    s3: S3Server, prefix, far, tmp_path, meanwhile, theirs: range, capsys
) -> None:
    """Of the other's some are new, or it has one that stands in the middle of a shard here."""
    here = {"img_dir": folder_of(tmp_path, "here", range(6)), "img_size": [32]}
    there = {"img_dir": folder_of(tmp_path, "there", theirs), "img_size": [32]}
    meanwhile(lambda: precompute(far(there, state="other")))
    summary = precompute(far(here))
    sources = {f"{number}.png" for number in {*range(6), *theirs}}
    assert (summary.samples, summary.exit_code) == (len(sources), 0)
    assert "has a new generation: joining it" in capsys.readouterr().err
    check_whole(f"s3://{BUCKET}/{prefix}", sources)
    # the one that was made in vain is gone
    assert len([key for key in s3.objects(prefix) if key.startswith("manifest-")]) == 2
    s3.requests.clear()
    for data in (here, there):
        assert precompute(far(data)).samples_written == 0
    assert changes(s3) == []


@pytest.mark.parametrize("first", [True, False])
def test_one_dataset_twice_at_once_is_one_set(
    s3: S3Server, prefix, far, tmp_path, meanwhile, make_settings, published: Published, first: bool
) -> None:
    data = {"img_dir": folder_of(tmp_path, "images", range(6)), "img_size": [32]}
    if not first:
        precompute(far(data))
        precompute(make_settings(data))
        folder_of(tmp_path, "images", range(6, 9))
    precompute(make_settings(data))
    meanwhile(lambda: precompute(far(data, state="other")))
    summary = precompute(far(data))
    assert summary.exit_code == 0
    assert s3.objects(prefix) == published(tmp_path / "shards")


def test_a_write_whose_answer_is_lost_and_another_on_top_of_it(
    s3: S3Server, prefix, far, tmp_path, monkeypatch
) -> None:
    """The first run's generation is the second's history: it must stay."""
    here = {"img_dir": folder_of(tmp_path, "here", range(3)), "img_size": [32]}
    there = {"img_dir": folder_of(tmp_path, "there", range(3, 6)), "img_size": [32]}
    put_if = objects.ObjectRemote.replace

    def lost(remote: objects.ObjectRemote, name: str, data: bytes, version: str | None) -> str:
        result = put_if(remote, name, data, version)
        if name == "manifest.json":
            monkeypatch.setattr(objects.ObjectRemote, "replace", put_if)
            precompute(far(there, state="other"))
            return put_if(remote, name, data, version)  # as if the first had not been answered
        return result

    monkeypatch.setattr(objects.ObjectRemote, "replace", lost)
    assert precompute(far(here)).samples == 6
    check_whole(f"s3://{BUCKET}/{prefix}", {f"{number}.png" for number in range(6)})
    names = [key for key in s3.objects(prefix) if key.startswith("manifest-")]
    assert len(names) == 2


@pytest.mark.slow
def test_other_encoders_meanwhile_are_refused_and_change_nothing(
    s3: S3Server, prefix, far, tmp_path, meanwhile
) -> None:
    here = {"img_dir": folder_of(tmp_path, "here", range(3)), "img_size": [32]}
    there = {"img_dir": folder_of(tmp_path, "there", range(3, 6)), "img_size": [32]}
    meanwhile(lambda: precompute(far(there, state="other", text_encoder_dtype="float32")))
    with pytest.raises(InputError, match="made with other encoders: text.compute_dtype"):
        precompute(far(here))
    check_whole(f"s3://{BUCKET}/{prefix}", {f"{number}.png" for number in range(3, 6)})
    names = [key for key in s3.objects(prefix) if key.startswith("manifest-")]
    assert len(names) == 1


def test_samples_that_are_pruned_meanwhile_are_missed(
    s3: S3Server, prefix, far, tmp_path, meanwhile
) -> None:
    """A retired sample only had to be taken off the list, and then its record was gone."""
    from qwen_lora.shards.prune import prune

    url = f"s3://{BUCKET}/{prefix}"
    folder = folder_of(tmp_path, "images", range(3))
    data = {"img_dir": folder, "img_size": [32]}
    precompute(far(data))
    aside = tmp_path / "aside"
    folder.rename(aside)
    folder_of(tmp_path, "images", range(2))
    precompute(far(data), sync=True, yes=True)
    for name in ("2.png", "2.txt"):
        shutil.copy(aside / name, folder)
    folder_of(tmp_path, "images", range(3, 4))
    meanwhile(lambda: prune(url, everything=True))
    with pytest.raises(QwenLoraError, match="1 samples of this dataset were pruned"):
        precompute(far(data))
    assert precompute(far(data)).samples == 4
    check_whole(url, {f"{number}.png" for number in range(4)}, history=False)


# ---- faults on the way ---------------------------------------------------------------------------


def random_fault(rng: random.Random) -> Fault:
    kind = rng.choices(
        ["reset", "lost", "status", "cut", "flip", "refused"], [18, 18, 24, 20, 4, 1]
    )[0]
    status = {"status": rng.choice([429, 500, 502, 503, 504]), "refused": 403}.get(kind)
    return Fault("status", status) if status else Fault(kind, rng.randrange(1 << 30))


def run_under_faults(s3: S3Server, settings: Settings, rng: random.Random) -> bool:
    """False when it ended with an error, which has to be one line without a secret."""
    rate = rng.choice([0.1, 0.3, 0.5])
    s3.faults += [random_fault(rng) if rng.random() < rate else None for _ in range(120)]
    try:
        assert precompute(settings).exit_code == 0
        return True
    except QwenLoraError as error:
        said = str(error)
        assert said and "\n" not in said and SECRET not in said and "AKIA" not in said
        return False
    finally:
        s3.faults.clear()


def run_fault_sequences(
    s3: S3Server,
    prefix: str,
    far: Callable[..., Settings],
    make_settings: Callable[..., Settings],
    published: Published,
    tmp_path: Path,
    seeds: range,
) -> int:
    """Each a first run and one with more images, repeated until they come through; returns how
    often there was an error."""
    errors = 0
    small = {"img_dir": folder_of(tmp_path, "small", range(4)), "img_size": [32]}
    large = {"img_dir": folder_of(tmp_path, "large", range(7)), "img_size": [32]}
    wanted = []
    for data in (small, large):
        precompute(make_settings(data, shard_max_samples=2))
        wanted.append(published(tmp_path / "shards"))
    for seed in seeds:
        rng = random.Random(f"faults {seed}")
        for key in s3.keys(prefix):
            s3.delete(key)
        for data, files in zip((small, large), wanted, strict=True):
            while not run_under_faults(s3, far(data, shard_max_samples=2), rng):
                errors += 1
                left = s3.objects(prefix)
                assert left.pop("manifest.json", None) in (
                    None,
                    *(each["manifest.json"] for each in wanted),
                ), seed
                assert left.items() <= files.items(), seed
            assert s3.objects(prefix) == files, seed
    return errors


def test_faults_on_the_way(
    s3: S3Server, prefix, far, make_settings, published: Published, tmp_path, fault_seed: int
) -> None:
    seeds = range(fault_seed, fault_seed + 1)
    run_fault_sequences(s3, prefix, far, make_settings, published, tmp_path, seeds)


@pytest.mark.slow
def test_many_faults_on_the_way(
    s3: S3Server, prefix, far, make_settings, published: Published, tmp_path, fault_seed: int
) -> None:
    seeds = range(fault_seed, fault_seed + 60)
    errors = run_fault_sequences(s3, prefix, far, make_settings, published, tmp_path, seeds)
    print(f"120 runs under random faults, {errors} errors, and every set the same to the byte")
    assert errors > 10
