"""A set's `.local` comes from strangers too, when somebody packs a whole folder: what it holds must
not choose which files outside are written, swept or read for ever."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qwen_lora.config.schema import DataConfig, Settings
from qwen_lora.errors import InputError
from qwen_lora.precompute.remembered import RememberedSources
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.merge import merge
from qwen_lora.shards.prune import prune
from tests.shards.conftest import publish, sorted_samples, write_one

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
Change = Callable[[Path, Path], object]


def a_set(folder: Path, first: int) -> Path:
    folder.mkdir()
    publish(folder, [write_one(folder, sorted_samples(3, first))])
    return folder


def run_precompute(folder: Path, model: Path) -> object:
    images = folder.parent / "images"
    images.mkdir()
    Image.new("RGB", (64, 64), "red").save(images / "a.png")
    (images / "a.txt").write_text("red")
    data = DataConfig(img_dir=images, img_size=[64])
    return precompute(
        Settings(pretrained_model_name_or_path=str(model), data_config=data, shards_dir=folder)
    )


CHANGES: dict[str, Change] = {
    "prune": lambda folder, model: prune(folder),
    "merge": lambda folder, model: merge([a_set(folder.parent / "other", 10)], folder),
    "precompute": run_precompute,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["local-folder-link", "lock-link", "lock-dangling-link"])
def test_links_in_it_are_not_followed(
    change: str, where: str, tmp_path: Path, tiny_model: Path
) -> None:
    folder = a_set(tmp_path / "set", 0)
    outside = tmp_path / "outside"
    outside.mkdir()
    victims = [outside / name for name in ("precious", "shard-part-1.tmp", ".notes.tmp", "lock")]
    for victim in victims:
        victim.write_text("keep me")
    local = folder / ".local"
    if local.exists():
        for path in local.iterdir():
            path.unlink()
        local.rmdir()
    if where == "local-folder-link":
        local.symlink_to(outside)
    else:
        local.mkdir()
        (local / "lock").symlink_to(outside / ("precious" if where == "lock-link" else "new"))
    with pytest.raises(InputError, match="is a link"):
        CHANGES[change](folder, tiny_model)
    assert sorted(path.name for path in outside.iterdir()) == sorted(v.name for v in victims)
    assert all(victim.read_text() == "keep me" for victim in victims)


@pytest.mark.parametrize("kind", ["pipe", "endless", "deep", "other types"])
def test_what_it_claims_to_remember_is_read_with_care(kind: str, tmp_path: Path) -> None:
    """Neither waited for, nor read without end, nor trusted to be what this program writes."""
    file = tmp_path / "sources.json"
    rules = RememberedSources(tmp_path / "absent.json", {})._rules
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "deep":
        file.write_text("[" * 100_000)
    else:
        import json

        known = {"/a": 1, "/b": [1], "/c": {"0": 1}, "/d": [1, 2, 3, 4, 5, 6], "/e": None}
        file.write_text(json.dumps({"rules": rules, "known": known}))
    assert RememberedSources(file, {})._known == {}
