"""What reading one training sample costs, beside plain webdataset and torch.save files.

python benchmarks/data_path.py [--samples N] [--repeats N]

One thread, files in the page cache, samples of about 1.4 MB (a 1024 px latent and 128 tokens).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import warnings
from pathlib import Path

import safetensors.torch
import torch
import webdataset
from common import machine, median_ms, print_table, spread, take_turns
from synthetic import write_set

from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import decode_meta, decode_tensors
from qwen_lora.shards.tools import shard_urls


class Unhashed(ShardSet):
    """The same reader without the sha256 of what it reads."""

    def _intact(self, data: memoryview, row: int, member: int) -> bool:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), options.samples, options.repeats)


def measure(folder: Path, count: int, repeats: int) -> None:
    write_set(folder / "set", count, px=1024, tokens=128)
    with ShardSet.open(folder / "set") as shards, Unhashed.open(folder / "set") as unhashed:
        buffers = [shards.read_bytes(row) for row in range(count)]
        files = []
        for row in range(count):
            files.append(folder / f"{row}.pt")
            torch.save(shards.read(row).tensors, files[-1])
        urls = shard_urls(folder / "set")

        def ours() -> None:
            for row in range(count):
                shards.read(row)

        def without_hash() -> None:
            for row in range(count):
                unhashed.read(row)

        def hashing() -> None:
            for meta, tensors in buffers:
                hashlib.sha256(meta).digest()
                hashlib.sha256(tensors).digest()

        def decoding() -> None:
            for row, (meta, tensors) in enumerate(buffers):
                decode_meta(meta)
                decode_tensors(tensors, shards.shape(row))

        def plain() -> None:
            for sample in webdataset.WebDataset(urls, shardshuffle=False):
                json.loads(sample["json"])
                safetensors.torch.load(sample["safetensors"])

        def torch_files() -> None:
            for path in files:
                torch.load(path, weights_only=True)

        taken = take_turns(
            {
                "ShardSet.read (verified, finite values checked)": ours,
                "  of that: sha256 of the members": hashing,
                "  of that: checks and decoding": decoding,
                "ShardSet.read without the hash": without_hash,
                "webdataset + safetensors.torch.load": plain,
                "torch.load of torch.save files": torch_files,
            },
            repeats,
        )
    size = sum(len(meta) + len(tensors) for meta, tensors in buffers) / count / 1e6
    base = median_ms([one.cpu for one in taken["webdataset + safetensors.torch.load"]], count)
    rows = []
    for name, times in taken.items():
        wall, cpu = [one.wall for one in times], [one.cpu for one in times]
        median = median_ms(wall, count)
        rows.append(
            [
                name,
                f"{median:.2f}",
                spread(wall, count),
                f"{median_ms(cpu, count):.2f}",
                f"{median_ms(cpu, count) / base:.2f}",
            ]
        )
    print_table(
        f"{count} samples of {size:.2f} MB, {repeats} repeats in turn, ms a sample",
        ["", "median", "min-max", "cpu", "cpu vs webdataset"],
        rows,
    )


if __name__ == "__main__":
    main()
