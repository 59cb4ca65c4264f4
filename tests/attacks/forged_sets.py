"""Shard sets as an attacker publishes them: every hash and length is right, the content is not."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.shards.manifest import content_name
from qwen_lora.shards.tar import MEMBERS, canonical_header, padded, tar_bytes
from tests.shards.conftest import write_set


@cache
def _sound_files() -> dict[str, bytes]:
    """A sound set of two samples in one shard, by file name."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_set(Path(name), count=2, per_shard=2)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Forgery:
    """A sound set in parts that can be replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, content in _sound_files().items():
            (folder / name).write_bytes(content)
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        entry = self.manifest["shards"][0]
        self.sidecar: dict[str, Any] = json.loads((folder / entry["sidecar"]["name"]).read_bytes())
        self.tar = (folder / entry["tar"]["name"]).read_bytes()
        self.records = [  # [json, safetensors] a sample
            [self.tar[offset : offset + size] for offset, size in self._places(row)]
            for row in range(2)
        ]

    def _places(self, row: int) -> list[tuple[int, int]]:
        columns = self.sidecar["columns"]
        return [(columns[f"{name}_offset"][row], columns[f"{name}_bytes"][row]) for name in MEMBERS]

    # ---- changing --------------------------------------------------------------------------------

    def member(self, row: int, member: int, content: bytes) -> None:
        """Another content of a member; the tar is laid out anew, the sidecar vouches for it."""
        self.records[row][member] = content
        columns, tar = self.sidecar["columns"], b""
        for number, record in enumerate(self.records):
            for name, data in zip(MEMBERS, record, strict=True):
                tar += canonical_header(f"{columns['sample_id'][number]}.{name}", len(data))
                columns[f"{name}_offset"][number] = len(tar)
                columns[f"{name}_bytes"][number] = len(data)
                columns[f"{name}_sha256"][number] = sha256_hex(data)
                tar += data + bytes(padded(len(data)) - len(data))
        self.tar = tar + bytes(tar_bytes(len(tar)) - len(tar))

    def facts(self, row: int, change: Callable[[dict[str, Any]], Any]) -> None:
        """Another JSON member."""
        value = json.loads(self.records[row][0])
        self.member(row, 0, canonical_json(change(value) or value))

    def listed(self, kind: str, suffix: str, content: bytes) -> None:
        """Another small file that the manifest lists."""
        sha256 = sha256_hex(content)
        name = content_name(kind, sha256, suffix)
        (self.folder / name).write_bytes(content)
        self.manifest[kind] = {"name": name, "bytes": len(content), "sha256": sha256}

    # ---- publishing ------------------------------------------------------------------------------

    def publish(self, sidecar: bytes | None = None, manifest: bytes | None = None) -> None:
        """Write everything under names and hashes that fit; raw bytes replace either value."""
        for path in [*self.folder.glob("shard-*"), *self.folder.glob("manifest*")]:
            path.unlink()
        entry = self.manifest["shards"][0]
        entry["tar"] = self._file(content_name("shard", sha256_hex(self.tar), ".tar"), self.tar)
        data = canonical_json(self.sidecar) if sidecar is None else sidecar
        name = entry["tar"]["name"].replace(".tar", ".json")
        entry["sidecar"] = self._file(name, data)
        data = canonical_json(self.manifest) if manifest is None else manifest
        for name in ("manifest.json", content_name("manifest", sha256_hex(data), ".json")):
            (self.folder / name).write_bytes(data)

    def _file(self, name: str, data: bytes) -> dict[str, Any]:
        (self.folder / name).write_bytes(data)
        return {"name": name, "bytes": len(data), "sha256": sha256_hex(data)}
