"""Large sets open quickly and stay small in memory: sidecars only, their tars are holes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import FileEntry, Manifest, ShardEntry, sample_id
from qwen_lora.shards.manifest import content_name, encode_manifest
from qwen_lora.shards.sidecar import MemberEntry, Sidecar, SidecarRow, encode_sidecar
from qwen_lora.shards.tar import BLOCK, padded, tar_bytes

from .conftest import CHANNELS, FINGERPRINT, SCALE, WIDTH

JSON_BYTES, TENSOR_BYTES = 400, 600_000

# Run alone, so that the peak is this set's; torch is not there to be counted either.
OPEN = """
import resource, sys, time
import numpy, qwen_lora.shards.reader as reader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
table = reader.ShardSet.open(sys.argv[1]).table
seconds = time.perf_counter() - start
assert table.token_counts.sum() == 77 * len(table)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(table), seconds, (peak - before) / 1024)
"""


def digest(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def sparse_shard(folder: Path, number: int, samples: int) -> ShardEntry:
    """A sidecar of made-up rows, and a tar of the right length without content."""
    ids = []
    for index in range(samples):
        latent, texts = digest("latent", number, index), [digest("text", number, index)]
        ids.append((sample_id(latent, texts), latent, texts))
    rows, position = [], 0
    for name, latent, texts in sorted(ids):
        facts = MemberEntry(position + BLOCK, JSON_BYTES, digest(name))
        begin = facts.offset + padded(JSON_BYTES) + BLOCK
        tensors = MemberEntry(begin, TENSOR_BYTES, digest(latent))
        source, group = digest("source", name), f"group {number % 3}"
        rows.append(
            SidecarRow(name, latent, tuple(texts), source, group, (512, 768), (77,), facts, tensors)
        )
        position = rows[-1].end
    data = encode_sidecar(Sidecar(FINGERPRINT, {}, tuple(rows)))
    sha256 = digest("tar", number)
    tar = FileEntry(content_name("shard", sha256, ".tar"), tar_bytes(position), sha256)
    sidecar = FileEntry(content_name("shard", sha256, ".json"), len(data), sha256_hex(data))
    (folder / sidecar.name).write_bytes(data)
    with open(folder / tar.name, "wb") as file:
        file.truncate(tar.bytes)
    return ShardEntry(tar, sidecar, samples)


def sparse_set(folder: Path, samples: int, per_shard: int) -> None:
    folder.mkdir()
    shards = tuple(
        sparse_shard(folder, number, per_shard) for number in range(samples // per_shard)
    )
    manifest = Manifest(
        fingerprint=FINGERPRINT,
        latent_channels=CHANNELS,
        latent_scale=SCALE,
        text_width=WIDTH,
        posterior="mode",
        model={},
        recipe={},
        shards=shards,
        unconditional=FileEntry(f"unconditional-{'0' * 12}.safetensors", 1, "0" * 64),
        counts={"samples": samples},
        histograms={},
    )
    data = encode_manifest(manifest)
    (folder / "manifest.json").write_bytes(data)
    (folder / content_name("manifest", sha256_hex(data), ".json")).write_bytes(data)


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="measures memory as POSIX does")
@pytest.mark.parametrize(
    ("samples", "seconds", "mib"),
    # Generous limits on time: a busy machine fails no test. 1e6 rows took 4 s on two cores.
    [(100_000, 30, 200), pytest.param(1_000_000, 120, 700, marks=pytest.mark.slow)],
)
def test_a_large_set_opens(tmp_path: Path, samples: int, seconds: float, mib: float) -> None:
    sparse_set(tmp_path / "set", samples, per_shard=5_000)
    command = [sys.executable, "-c", OPEN, str(tmp_path / "set")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found, took, grown = map(float, result.stdout.split())
    assert found == samples
    assert took < seconds
    assert grown < mib
