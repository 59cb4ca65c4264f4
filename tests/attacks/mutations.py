"""Random damage to one shard, and what this reader and plain webdataset make of it.

    PYTHONPATH=. python tests/attacks/mutations.py [--count N] [--seed S]

prints the table of docs/reliability.md.
A mutation is a truncation, a flipped bit anywhere, a flipped bit in a tar header, or a structural
one: members or blocks dropped, repeated, swapped, moved, overwritten, or put in from elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
import webdataset

from qwen_lora.errors import QwenLoraError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.tar import canonical_header, padded
from qwen_lora.shards.verify import verify
from tests.shards.conftest import write_set

SAMPLES = 8
KINDS = ("truncation", "bit flip", "header flip", "structural")
OURS = ("refused", "outside every member, same records", "wrong")
PLAIN = ("error", "samples lost silently", "content changed silently", "unharmed")

Records = dict[str, tuple[object, dict[str, bytes]]]
Spans = list[tuple[int, int]]  # [begin, end) of each member with header and padding


# ---- damage --------------------------------------------------------------------------------------


def spans_of(shards: ShardSet) -> Spans:
    table = shards.table
    places = zip(table.member_offsets.ravel(), table.member_bytes.ravel(), strict=True)
    return [(int(offset) - 512, int(offset) + padded(int(size))) for offset, size in places]


def mutate(kind: str, data: bytes, spans: Spans, rng: random.Random) -> bytes:
    if kind == "truncation":
        return data[: rng.randrange(len(data))]
    if kind == "bit flip":
        return _flip(data, rng.randrange(len(data)), rng)
    if kind == "header flip":
        return _flip(data, rng.choice(spans)[0] + rng.randrange(512), rng)
    return rng.choice(STRUCTURAL)(data, spans, rng)


def _flip(data: bytes, position: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _drop(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    begin, end = rng.choice(spans)
    return data[:begin] + data[end:]


def _repeat(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    begin, end = rng.choice(spans)
    return data[:end] + data[begin:]


def _swap(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    (a, b), (c, d) = sorted(rng.sample(spans, 2))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _swap_content(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    """Two members of equal length change places, their headers stay."""
    pairs = [
        (one, other)
        for index, one in enumerate(spans)
        for other in spans[index + 1 :]
        if one[1] - one[0] == other[1] - other[0]
    ]
    (a, b), (c, d) = rng.choice(pairs)
    return data[: a + 512] + data[c + 512 : d] + data[b : c + 512] + data[a + 512 : b] + data[d:]


def _insert(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    """A foreign member between two."""
    content = rng.randbytes(rng.randrange(1, 2000))
    name = rng.choice(["x.json", f"{rng.getrandbits(128):032x}.safetensors", "../x.pkl", "y"])
    block = canonical_header(name, len(content)) + content
    block += bytes(padded(len(content)) - len(content))
    begin = rng.choice(spans)[0]
    return data[:begin] + block + data[begin:]


def _zero_block(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    begin = 512 * rng.randrange(len(data) // 512)
    return data[:begin] + bytes(512) + data[begin + 512 :]


def _zero_header(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    begin = rng.choice(spans)[0]
    return data[:begin] + bytes(512) + data[begin + 512 :]


def _move_block(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    """512 bytes put where others were: a misdirected write."""
    source, target = (512 * rng.randrange(len(data) // 512) for _ in range(2))
    return data[:target] + data[source : source + 512] + data[target + 512 :]


def _garbage(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    begin, size = rng.randrange(len(data)), rng.randrange(1, 4096)
    return data[:begin] + rng.randbytes(min(size, len(data) - begin)) + data[begin + size :]


def _append(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    return data + rng.choice([data, rng.randbytes(512), bytes(10240), b"\1"])


def _rename(data: bytes, spans: Spans, rng: random.Random) -> bytes:
    """A sound header with another name or length."""
    begin, end = rng.choice(spans)
    name = rng.choice(["x.json", "a.b.safetensors", ".hidden", f"{rng.getrandbits(128):032x}.json"])
    size = max(0, end - begin - 512 - rng.choice([0, 0, 512, 1]))
    return data[:begin] + canonical_header(name, size) + data[begin + 512 :]


STRUCTURAL: tuple[Callable[[bytes, Spans, random.Random], bytes], ...] = (
    *(_drop, _repeat, _swap, _swap_content, _insert, _zero_block, _zero_header, _move_block),
    *(_garbage, _append, _rename),
)


# ---- readers -------------------------------------------------------------------------------------


def read_here(folder: Path) -> Records:
    """Every record as training gets it. Raises QwenLoraError."""
    found: Records = {}
    with ShardSet.open(folder) as shards:
        for row in range(len(shards)):
            record = shards.read(row)
            found[shards.table.sample_id[row]] = record.meta, _bytes(record.tensors)
    return found


def read_plain(tar: Path) -> list[tuple[str, object, dict[str, bytes]]]:
    """Every sample as a plain webdataset pipeline decodes it: json and safetensors, by name."""
    return [
        (
            sample["__key__"],
            json.loads(sample["json"]),
            _bytes(safetensors.torch.load(sample["safetensors"])),
        )
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    ]


def _bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Bits, shapes and types: NaN equals itself, and a permuted shape is another tensor."""
    return {
        name: repr((tensor.dtype, tuple(tensor.shape))).encode()
        + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


class Bench:
    """One sound set whose only shard is damaged again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_set(folder, count=SAMPLES, per_shard=SAMPLES)
        self.tar = next(self.folder.glob("*.tar"))
        self.original = self.tar.read_bytes()
        with ShardSet.open(self.folder) as shards:
            self.spans = spans_of(shards)
        self.here, self.plain = read_here(self.folder), read_plain(self.tar)

    def damage(self, kind: str, seed: int) -> None:
        """Never the original bytes: a mutation that changes nothing is drawn again."""
        rng = random.Random(f"{kind} {seed}")
        changed = self.original
        while changed == self.original:
            changed = mutate(kind, self.original, self.spans, rng)
        self.tar.write_bytes(changed)

    def repair(self) -> None:
        self.tar.write_bytes(self.original)

    def outcome_here(self) -> str:
        try:
            return OURS[1] if read_here(self.folder) == self.here else OURS[2]
        except QwenLoraError:
            return OURS[0]

    def outcome_plain(self) -> str:
        try:
            found = read_plain(self.tar)
        except Exception:  # whatever tarfile, webdataset, json or safetensors raise
            return PLAIN[0]
        if found == self.plain:
            return PLAIN[3]
        lost = {sample[0] for sample in self.plain} - {sample[0] for sample in found}
        return PLAIN[1] if lost else PLAIN[2]

    def found_by_verify(self) -> bool:
        return not verify(self.folder).ok


Counts = dict[str, Counter[str]]


def run(bench: Bench, count: int, seed: int) -> Iterator[tuple[str, int, str, bool, str]]:
    """(kind, seed of the mutation, outcome here, found by verify, outcome in plain webdataset)."""
    for number in range(seed, seed + -(-count // len(KINDS))):
        for kind in KINDS:
            bench.damage(kind, number)
            yield kind, number, bench.outcome_here(), bench.found_by_verify(), bench.outcome_plain()
    bench.repair()


def table(counts: Counter[tuple[str, str]]) -> str:
    """Markdown, one row a kind."""
    columns = ["mutated", *OURS, "found by verify", *PLAIN]
    lines = [
        "| | mutated | " + " | ".join(f"here: {name}" for name in (*OURS, "found by `verify`")),
        "|---" + "|---:" * len(columns) + "|",
    ]
    lines[0] += " | " + " | ".join(f"webdataset: {name}" for name in PLAIN) + " |"
    for kind in (*KINDS, "all"):
        kinds = KINDS if kind == "all" else (kind,)
        cells = [f"{sum(counts[each, name] for each in kinds):,}" for name in columns]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tally(folder: Path, count: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by kind and outcome, and the mutations that were not caught, with their seeds."""
    counts: Counter[tuple[str, str]] = Counter()
    missed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        for kind, number, here, found, plain in run(Bench(folder), count, seed):
            counts.update([(kind, "mutated"), (kind, here), (kind, plain)])
            counts[kind, "found by verify"] += found
            if here == OURS[2] or not found:
                missed.append(f"{kind}, seed {number}: {here}, verify found it: {found}")
        gc.collect()
    return counts, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        counts, missed = tally(Path(name) / "set", options.count, options.seed)
    print(table(counts))
    print("\n".join(missed) or f"none missed, seed {options.seed}")


if __name__ == "__main__":
    main()
