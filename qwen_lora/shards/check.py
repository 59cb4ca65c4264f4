"""Reading a whole shard once, front to back, and comparing it with what its sidecar says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

from qwen_lora.errors import ShardError
from qwen_lora.hashing import CHUNK_BYTES, sha256_hex
from qwen_lora.shards.format import (
    Fingerprint,
    Geometry,
    Manifest,
    RecordMeta,
    latent_id,
    text_id,
)
from qwen_lora.shards.record import (
    LATENT_NAMES,
    RecordShape,
    check_tensors,
    check_values,
    decode_meta,
)
from qwen_lora.shards.safe import TensorEntry, parse_tensor_header
from qwen_lora.shards.sidecar import SidecarRow
from qwen_lora.shards.tar import BLOCK, MEMBERS, canonical_header, padded, tar_bytes


def scan_tar(
    file: BinaryIO,
    tar: str,
    rows: Sequence[SidecarRow],
    on_record: Callable[[SidecarRow, bytes, bytes], None],
) -> tuple[str, int, list[str]]:
    """sha256 and length of an open tar, and all in it that is not as `rows` and the format say.

    `tar` is its name for messages; it is read from where `file` stands, to be its beginning.
    Canonical headers, member hashes, zero padding, one end and nothing behind it; only one record
    is held in memory. `on_record` gets each record whose hashes are right; its ShardErrors count.
    """
    problems: list[str] = []
    digest = hashlib.sha256()
    length = os.fstat(file.fileno()).st_size

    def take(size: int) -> bytes:
        data = file.read(size)
        digest.update(data)
        return data

    for row in rows:
        if row.end > length:
            problems.append(f"{tar}: ends before sample {row.sample_id} does")
            break
        members = [_member(take, row, name, tar, problems) for name in MEMBERS]
        if None in members:
            continue
        try:
            on_record(row, *(data for data in members if data is not None))
        except ShardError as error:
            problems.append(str(error))
    end = rows[-1].end if rows else 0
    tail = take(max(0, min(length, tar_bytes(end)) - file.tell()))
    if length != tar_bytes(end) or tail.strip(b"\0"):
        problems.append(
            f"{tar}: does not end as a tar after its last member ({length} bytes, "
            f"{tar_bytes(end)} expected)"
        )
    while take(CHUNK_BYTES):
        pass
    return digest.hexdigest(), length, problems


def _member(
    take: Callable[[int], bytes], row: SidecarRow, name: str, tar: str, problems: list[str]
) -> bytes | None:
    """The next member's bytes; None, and a line in `problems`, when they are not the sidecar's."""
    entry = row.json if name == "json" else row.safetensors
    what = f"{tar}, sample {row.sample_id}"
    if take(BLOCK) != canonical_header(f"{row.sample_id}.{name}", entry.bytes):
        problems.append(f"{what}: the tar header of its {name} member is not canonical")
    data = take(entry.bytes)
    if take(padded(entry.bytes) - entry.bytes).strip(b"\0"):
        problems.append(f"{what}: bytes behind its {name} member")
    if sha256_hex(data) == entry.sha256:
        return data
    problems.append(f"{what}: the {name} member is damaged")
    return None


def expected_shape(manifest: Manifest, row: SidecarRow) -> RecordShape:
    """What the tensors of a row must look like in a set of this manifest."""
    scale = manifest.latent_scale
    latent = (manifest.latent_channels, row.bucket[0] // scale, row.bucket[1] // scale)
    names = LATENT_NAMES[manifest.posterior]
    return RecordShape(names, latent, row.token_counts, manifest.text_width)


def check_record(
    row: SidecarRow,
    facts: bytes | memoryview,
    tensors: bytes | memoryview,
    fingerprint: Fingerprint,
    expected: RecordShape | None,
    what: str,
    deep: bool = False,
) -> None:
    """Raises ShardError unless a record is what its row says and its ids are those of its contents.

    expected: shapes that the manifest asks for; None where there is no manifest yet, then the
    shapes only have to fit each other and the row. `deep` looks at every value too.
    """
    _check_meta(decode_meta(facts, what), row, fingerprint, what)
    if expected is None:
        expected = _own_shape(parse_tensor_header(tensors, what), row.token_counts)
    entries = check_tensors(tensors, expected, what)
    if deep:
        check_values(tensors, entries, what)


def _check_meta(meta: RecordMeta, row: SidecarRow, fingerprint: Fingerprint, what: str) -> None:
    if (meta.bucket, meta.source_sha256, meta.group) != (row.bucket, row.source_sha256, row.group):
        raise ShardError(f"{what}: the JSON member and the sidecar differ")
    geometry = Geometry(meta.crop_box, meta.bucket, meta.flipped)
    if row.latent_id != latent_id(meta.source_sha256, geometry, fingerprint.vae_hash):
        raise ShardError(f"{what}: the latent id is not that of its source, crop and encoder")
    if meta.captions is not None:
        texts = [text_id(text, fingerprint.text_hash) for text in meta.captions]
        if list(row.text_ids) != texts:
            raise ShardError(f"{what}: the text ids are not those of its captions")
    if len(meta.truncated_tokens) != len(row.token_counts):
        raise ShardError(f"{what}: truncated_tokens has another length than the captions")


def _own_shape(entries: dict[str, TensorEntry], token_counts: tuple[int, ...]) -> RecordShape:
    """The shape that a record's own latents and text width make, with the row's token counts."""
    names = next((names for names in LATENT_NAMES.values() if names[0] in entries), ())
    latents = entries[names[0]].shape if names else ()
    embeds = entries["prompt_embeds.0"].shape if "prompt_embeds.0" in entries else ()
    channels, height, width = latents if len(latents) == 3 else (0, 0, 0)
    return RecordShape(names, (channels, height, width), token_counts, embeds[-1] if embeds else 0)
