"""Damage that lies outside every member reaches neither a step nor the result."""

import shutil
from pathlib import Path

from random_sets import MakeSettings

from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.verify import verify
from qwen_lora.train.run import train


def overwrite_outside(folder: Path) -> int:
    """Every byte of every tar that belongs to no member becomes 0xff; how many there were."""
    with ShardSet.open(folder) as shards:
        table, changed = shards.table, 0
        for number, entry in enumerate(shards.manifest.shards):
            path = folder / entry.tar.name
            old, new = path.read_bytes(), bytearray(b"\xff" * entry.tar.bytes)
            rows = table.shard == number
            for offset, size in zip(
                table.member_offsets[rows].ravel(), table.member_bytes[rows].ravel(), strict=True
            ):
                new[offset : offset + size] = old[offset : offset + size]
                changed -= int(size)
            changed += len(new)
            path.write_bytes(new)
    return changed


def test_the_result_of_training_is_the_same(
    make_settings: MakeSettings, train_shards: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(train_shards, damaged)
    assert overwrite_outside(damaged) > 9 * 2 * 512
    assert not verify(damaged).ok
    sound = train(make_settings("sound", max_train_steps=6))
    same = train(make_settings("same", max_train_steps=6, shards_dir=damaged))
    assert same.lora.read_bytes() == sound.lora.read_bytes()
