"""Every named attack on a shard set, against every way of opening one, under an audit hook."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import hostile_archives
import hostile_contents
import numpy as np
import pytest
from audit_hook import Guard, guarded
from forged_sets import Forgery
from named_attacks import Attack

from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.shards import tools
from qwen_lora.shards.merge import merge
from qwen_lora.shards.preview import preview
from qwen_lora.shards.previews import RgbMap
from qwen_lora.shards.prune import prune
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify
from qwen_lora.shards.writer import adoptable_shards
from tests.shards.conftest import CHANNELS, FINGERPRINT, SCALE

ATTACKS = [*hostile_archives.ATTACKS, *hostile_contents.ATTACKS]
PAGE_TAGS = {
    *("!DOCTYPE", "html", "head", "meta", "title", "style", "body", "main", "h", "p", "dl", "div"),
    *("dt", "dd", "ul", "li", "img", "small", "code"),
}
SECONDS, BYTES = 5.0, 256 << 20  # what one opening may take and let the process grow by

Records = dict[str, tuple[bytes, bytes]]


def read_all(folder: Path) -> Records:
    with ShardSet.open(folder) as shards:
        shards.unconditional()
        shards.rgb_map()
        shards.preview_prompts()
        for row in range(len(shards)):
            shards.read(row)
        return {
            shards.table.sample_id[row]: (bytes(meta), bytes(tensors))
            for row in range(len(shards))
            for meta, tensors in [shards.read_bytes(row)]
        }


USES: dict[str, Callable[[Path], object]] = {
    "read": read_all,
    "verify": verify,
    "verify --deep": lambda folder: verify(folder, deep=True),
    "info": lambda folder: tools.format_info(tools.info(folder)),
    "list": lambda folder: list(tools.list_samples(folder)),
    "adoption": lambda folder: adoptable_shards(folder, FINGERPRINT),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What the forgeries were made from; using it once gets imports on first use over with."""
    folder = tmp_path_factory.mktemp("attacks") / "sound"
    Forgery(folder).publish()
    for use in USES.values():
        use(folder)
    merge([folder], folder.parent / "merged")
    prune(folder.parent / "merged")
    with pytest.MonkeyPatch.context() as patch:
        with_a_flat_map(patch)
        preview(folder, folder.parent / "look")
    with guarded(folder) as guard:
        for use in USES.values():
            use(folder)
    assert guard.violations == []
    return read_all(folder)


def attempt(use: Callable[[Path], object], folder: Path) -> tuple[Guard, object]:
    """What the guard saw, and what came out: a value or one of this project's errors."""
    outcome: object = None
    with guarded(folder) as guard:
        try:
            outcome = use(folder)
        except QwenLoraError as error:
            outcome = error
    return guard, outcome


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_it_is_refused_and_does_nothing(attack: Attack, sound: Records, tmp_path: Path) -> None:
    folder, canary = tmp_path / "set", tmp_path / "canary"
    attack.make(folder, canary)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for name, use in USES.items():
        guard, outcome = attempt(use, folder)
        assert guard.violations == [], name
        assert guard.seconds < SECONDS and guard.grown_bytes < BYTES, name
        if name == "read":
            unharmed = attack.text or (attack.outside and outcome == sound)
            assert isinstance(outcome, QwenLoraError) or unharmed, "it was read"
        elif name.startswith("verify"):
            found = isinstance(outcome, InputError) or not getattr(outcome, "ok", True)
            assert found, "verify did not find it"
        if isinstance(outcome, QwenLoraError):
            assert "\n" not in str(outcome) and str(outcome).isprintable()
    assert not canary.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "place", ["pipe:touch CANARY", "|touch CANARY", "$(touch CANARY)", "-rf", "file:///etc"]
)
def test_a_place_is_a_folder_or_a_url_and_never_a_command(place: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for use in (ShardSet.open, verify, tools.info):
        with pytest.raises(InputError):
            use(place.replace("CANARY", str(canary)))
    with guarded(tmp_path) as guard:
        try:
            ShardSet.open(place.replace("CANARY", str(canary)))
        except InputError:
            pass
    assert guard.violations == [] and not canary.exists()


def test_there_are_as_many_attacks_as_the_documentation_says() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names) >= 200


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
@pytest.mark.parametrize("way", ["records", "whole shards"])
def test_a_merge_does_not_pass_it_on(
    attack: Attack, way: str, sound: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`merge` refuses the set, or what it writes is sound."""
    if way == "whole shards":  # copied as they are, however small
        monkeypatch.setattr("qwen_lora.shards.merge.shard_samples_limit", lambda total: 1)
    folder, output, canary = tmp_path / "set", tmp_path / "output", tmp_path / "canary"
    attack.make(folder, canary)
    output.mkdir()
    outcome: object = None
    with guarded(folder, output) as guard:
        try:
            outcome = merge([folder], output)
        except QwenLoraError as error:
            outcome = error
    assert guard.violations == [] and not canary.exists()
    assert guard.seconds < SECONDS and guard.grown_bytes < BYTES
    if not isinstance(outcome, QwenLoraError):
        assert verify(output, deep=True).problems == []
        assert attack.text or read_all(output) == sound


def with_a_flat_map(patch: pytest.MonkeyPatch) -> None:
    """The forgeries that attack no map have none; then preview would end before it draws."""
    own = ShardSet.rgb_map
    colours = np.full(3 * SCALE**2, 0.5, np.float32)
    flat = RgbMap(np.zeros((9 * CHANNELS, 3 * SCALE**2), np.float32), colours, SCALE, 0.0)
    patch.setattr(ShardSet, "rgb_map", lambda shards: own(shards) or flat)


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_a_preview_of_it_shows_texts_alone(
    attack: Attack, sound: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`preview` refuses the set, or what it writes is a page without a script or an address."""
    folder, output, canary = tmp_path / "set", tmp_path / "output", tmp_path / "canary"
    attack.make(folder, canary)
    output.mkdir()
    with_a_flat_map(monkeypatch)
    with guarded(folder, output) as guard:
        try:
            preview(folder, output / "look")
        except QwenLoraError as error:
            assert "\n" not in str(error) and str(error).isprintable()
    assert guard.violations == [] and not canary.exists()
    assert guard.seconds < SECONDS and guard.grown_bytes < BYTES
    page = output / "look.html"
    assert page.exists() or not attack.text
    if page.exists():
        tags = set(re.findall(r"<\s*/?\s*([a-zA-Z!]+)", page.read_text("utf-8")))
        assert tags <= PAGE_TAGS
    assert {path.name for path in output.iterdir()} <= {"look.html", "look.png"}


@pytest.mark.parametrize("attack", [a for a in ATTACKS if " as name of " in a.name or a.text])
def test_prune_removes_nothing_elsewhere(attack: Attack, sound: Records, tmp_path: Path) -> None:
    folder, canary = tmp_path / "set", tmp_path / "canary"
    attack.make(folder, canary)
    victim = tmp_path / "shard-000000000000.tar"
    victim.write_bytes(b"x")
    with guarded(folder) as guard:
        try:
            prune(folder)
        except QwenLoraError:
            pass
    assert guard.violations == [] and not canary.exists() and victim.exists()
