"""Large sets open quickly and stay small in memory: sidecars only, their tars are holes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_lora.hashing import sha256_hex
from qwen_lora.shards.format import FileEntry, Manifest, ShardEntry, sample_id
from qwen_lora.shards.manifest import content_name, encode_manifest
from qwen_lora.shards.sidecar import MemberEntry, Sidecar, SidecarRow, encode_sidecar
from qwen_lora.shards.tar import BLOCK, padded, tar_bytes
from qwen_lora.shards.writer import write_unconditional

from .conftest import CHANNELS, FINGERPRINT, SCALE, WIDTH

JSON_BYTES, TENSOR_BYTES = 400, 600_000

# Run alone, so that the peak is this process's. torch, which planning imports, is there before the
# clock starts, and its memory counts.
OPEN_AND_PLAN = """
import sys, time
import torch
from qwen_lora.posix import peak_rss_gib
from qwen_lora.shards.reader import ShardSet
from qwen_lora.train.plan import BatchRule, PlanTable, plan_epoch
start = time.perf_counter()
shards = ShardSet.open(sys.argv[1])
opened = time.perf_counter()
table = PlanTable.from_sets([shards])
plan = plan_epoch(table, BatchRule(train_batch_size=4, micro_batches_per_step=8, seed=0), epoch=0)
planned = time.perf_counter()
assert shards.table.token_counts.sum() == 77 * len(table)
assert sorted(plan.row.tolist()) == list(range(len(table)))
print(len(table), opened - start, planned - start, peak_rss_gib() * 1024)
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
    unconditional = write_unconditional(
        folder, torch.ones(5, WIDTH).bfloat16(), torch.ones(5, dtype=torch.bool)
    )
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
        unconditional=unconditional,
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
    # Generous limits on time: a busy machine fails no test. 10^6 samples took 4.1 to 4.8 s.
    [(100_000, 30, 700), pytest.param(1_000_000, 60, 1024, marks=pytest.mark.slow)],
)
def test_a_large_set_opens_and_plans_an_epoch(
    tmp_path: Path, samples: int, seconds: float, mib: float
) -> None:
    sparse_set(tmp_path / "set", samples, per_shard=5_000)
    command = [sys.executable, "-c", OPEN_AND_PLAN, str(tmp_path / "set")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found, opened, planned, peak = map(float, result.stdout.split())
    print(
        f"{found:.0f} samples: opened after {opened:.1f} s, planned after {planned:.1f} s, "
        f"peak {peak:.0f} MiB"
    )
    assert found == samples
    assert planned < seconds
    assert peak < mib
