"""Random datasets, edited at random between runs, against a plain account of what must come out.

Of every run: seen = written + unchanged + duplicates + skipped, each as the account has it; the
live samples are exactly those that the account keeps; and the encoders saw only what was new.
"""

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from changing_sets import SETTLED, Encodes, add_image, watch_encoders

from qwen_lora.config.schema import Settings
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify

Pair = tuple[str, str]  # sha256 of an image's bytes, caption
EDITS = "add remove restore caption uncaption rename copy twin damage".split()
KINDS = {"good": 12, "cut off": 1, "junk": 1, "small": 1}  # how often each comes


@dataclass
class File:
    """One image file; `kind` is what its bytes are."""

    sha256: str
    kind: str
    caption: str | None


@dataclass
class Account:
    """What a set must hold after the runs so far."""

    stored: dict[Pair, str] = field(default_factory=dict)  # -> source name in its record
    live: set[Pair] = field(default_factory=set)
    read: dict[str, str] = field(default_factory=dict)  # path -> hash that is remembered of it

    def run(self, files: dict[str, File], sync: bool) -> dict[str, int]:
        """The counts that a run must print; changes the account as the run changes the set."""
        before = dict(self.read)
        owners: dict[Pair, str] = {}
        counts = dict.fromkeys(("written", "unchanged", "duplicate", "skipped"), 0)
        skipped = set()
        for name in sorted(files, key=os.fsencode):
            file = files[name]
            pair = file.sha256, file.caption or ""
            if file.caption is None or file.kind in ("junk", "small"):
                skipped.add(name)
            elif pair in owners:
                counts["duplicate"] += 1
            else:
                owners[pair] = name
                skipped |= {name} if file.kind == "cut off" else set()
            if file.caption is not None and file.kind != "junk":
                self.read[name] = file.sha256  # its header was read
        found = {pair: name for pair, name in owners.items() if name not in skipped}
        counts["skipped"] = len(skipped)
        counts["unchanged"] = len(found.keys() & self.stored.keys())
        counts["written"] = len(found) - counts["unchanged"]
        sources = {source for source, _ in found}
        unseen = {pair for pair in self.live if pair[0] not in sources}
        if sync:
            known = {files[name].sha256 for name in skipped} | {before.get(n) for n in skipped}
            unseen = {pair for pair in unseen if pair[0] in known or self.stored[pair] in skipped}
        self.stored = {**found, **self.stored}
        self.live = set(found) | unseen
        return counts


class Scenery:
    """A dataset folder that is edited at random, and what is in it."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.files: dict[str, File] = {}
        self.gone: list[tuple[str, bytes, File]] = []
        self.made = 0  # also numbers captions, so that no two are equal by chance

    def add(self) -> None:
        self.made += 1
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        name = self.rng.choice(["", "", "sub/"]) + f"{self.rng.randrange(10**6)}-{self.made}"
        self.write(name, kind, None if self.rng.random() < 0.05 else f"caption {self.made}")

    def write(self, name: str, kind: str, caption: str | None) -> None:
        path = add_image(
            self.folder,
            name,
            self.rng.randrange(10**9),
            caption or "",
            16 if kind == "small" else 32,
        )
        if caption is None:
            path.with_suffix(".txt").unlink()
        data = path.read_bytes()
        damage = {"cut off": data[:-40], "junk": b"no image " + data[:20]}
        self.store(f"{name}.png", damage.get(kind, data), kind, caption)

    def store(self, name: str, data: bytes, kind: str, caption: str | None) -> None:
        path = self.folder / name
        path.write_bytes(data)
        os.utime(path, ns=(SETTLED + self.made, SETTLED + self.made))
        if caption is None:  # a restored file may lie where another has a caption by now
            path.with_suffix(".txt").unlink(missing_ok=True)
        else:
            path.with_suffix(".txt").write_text(caption)
        self.files[name] = File(hashlib.sha256(data).hexdigest(), kind, caption)

    def edit(self) -> None:
        self.made += 1
        name = self.rng.choice(sorted(self.files))
        file, path = self.files[name], self.folder / name
        data = path.read_bytes()
        what = self.rng.choice(EDITS)
        if what == "add":
            self.add()
        elif what == "caption":
            self.store(name, data, file.kind, f"edited {self.made}")
        elif what == "restore" and self.gone:
            name, data, file = self.gone[self.rng.randrange(len(self.gone))]
            self.store(name, data, file.kind, file.caption)
        elif what == "uncaption" and file.caption is not None:
            path.with_suffix(".txt").unlink()
            self.files[name] = File(file.sha256, file.kind, None)
        elif what == "damage":
            self.store(name, path.read_bytes()[:-41], "junk", file.caption)
            self.write(
                name.removesuffix(".png"), self.rng.choice(["cut off", "junk"]), file.caption
            )
        elif what in ("rename", "copy", "twin"):
            caption = f"copied {self.made}" if what == "copy" else file.caption
            self.store(f"{self.made}.png", data, file.kind, caption)
        if what in ("remove", "rename", "damage", "caption"):
            self.gone.append((name, data, file))
        if what in ("remove", "rename") and len(self.files) > 4:
            path.unlink()
            path.with_suffix(".txt").unlink(missing_ok=True)
            del self.files[name]


def check_run(
    settings: Settings, scenery: Scenery, account: Account, seen: Encodes, sync: bool
) -> None:
    stored, live = set(account.stored), len(account.live)
    seen.clear()
    counts = account.run(scenery.files, sync)
    summary = precompute(settings, sync=sync, yes=sync)
    found = {name: getattr(summary, name) for name in counts}
    assert found == counts
    assert summary.seen == len(scenery.files) == sum(found.values())
    assert summary.samples == len(account.live)
    new = set(account.stored) - stored
    assert summary.samples_written == len(new)
    assert live + len(new) - summary.retired <= summary.samples  # others may have come back
    sources = {source for source, _ in stored}
    assert sum(seen.images) == sum(source not in sources for source, _ in new)
    known = {caption for _, caption in stored}
    assert set(seen.captions) >= {caption for _, caption in new} - known
    assert not set(seen.captions) & known
    with ShardSet.open(settings.shards_dir) as shards:
        metas = [shards.read_meta(row) for row in range(len(shards))]
    pairs = {(meta.source_sha256, (meta.captions or [""])[0]): meta.source for meta in metas}
    assert len(pairs) == len(metas)
    assert pairs == {pair: account.stored[pair] for pair in account.live}


def play(make: Callable[..., Settings], folder: Path, seed: str, images: int, runs: int) -> int:
    """One dataset through `runs` edited runs; how many files the runs saw."""
    print(f"dataset of {seed}")
    rng = random.Random(seed)
    scenery, account = Scenery(folder / "images", rng), Account()
    for _ in range(images):
        scenery.add()
    scenery.write("always", "good", "one that is always good")
    settings = make(
        {"img_dir": folder / "images", "img_size": [32]},
        shards_dir=folder / "shards",
        shard_max_samples=rng.choice([3, 7, None]),
        max_skip=10**6,
    )
    total = 0
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_encoders(patch)
        for run in range(runs):
            check_run(settings, scenery, account, seen, sync=bool(run) and rng.random() < 0.5)
            total += len(scenery.files)
            for _ in range(rng.randrange(1, images)):
                scenery.edit()
    assert verify(settings.shards_dir).problems == []
    return total


def test_random_edits(make_settings, tmp_path, fault_seed):
    for number in range(4):
        play(make_settings, tmp_path / str(number), f"{fault_seed}-{number}", images=12, runs=6)


@pytest.mark.slow
def test_ten_thousand_samples(make_settings, tmp_path, fault_seed):
    total = number = 0
    while total < 10_000:
        images = 10 + 37 * number % 200
        total += play(make_settings, tmp_path / str(number), f"{fault_seed}-{number}", images, 5)
        number += 1
    print(f"{total} files in {number} datasets")
