"""Publishing: shards, sidecars, the unconditional embedding, manifests. Whole or absent, always.

Everything is written to `.local/` first, fsynced, and then given its content name, which can only
replace equal bytes. The bytes depend on the samples alone: no clock, user, host or folder in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any

from qwen_lora.errors import QwenLoraError, ShardError
from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.posix import temporary_file
from qwen_lora.shards.check import check_record, scan_tar
from qwen_lora.shards.format import FileEntry, Fingerprint, Manifest, RecordMeta, ShardEntry
from qwen_lora.shards.generations import walk_generations
from qwen_lora.shards.manifest import (
    LISTED_MAX_BYTES,
    MANIFEST,
    content_name,
    decode_manifest,
    encode_manifest,
    read_retired,
    read_sidecar,
    summarize_rows,
)
from qwen_lora.shards.previews import PreviewPrompt, RgbMap, encode_previews, encode_rgb
from qwen_lora.shards.record import encode_meta, encode_record
from qwen_lora.shards.remote.base import ChangedRemotely
from qwen_lora.shards.safe import DTYPE_BYTES
from qwen_lora.shards.sidecar import (
    MemberEntry,
    Sidecar,
    SidecarRow,
    decode_sidecar,
    encode_sidecar,
)
from qwen_lora.shards.store import Place, Store, opened_store
from qwen_lora.shards.tar import BLOCK, MEMBERS, canonical_header, padded, tar_bytes

if TYPE_CHECKING:
    import torch

TEMPORARY = "shard-part-"


@dataclass(frozen=True)
class EncodedSample:
    """A finished record on its way into a shard; tensors in stored dtypes, on the CPU."""

    sample_id: str
    latent_id: str
    text_ids: tuple[str, ...]
    token_counts: tuple[int, ...]
    meta: RecordMeta
    tensors: dict[str, torch.Tensor]


def predicted_record_bytes(
    meta: RecordMeta, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> int:
    """Exact bytes of a record in its tar, headers and padding included, before it is encoded.

    tensors: name -> (safetensors dtype, shape), as `RecordShape.tensors` gives them.
    """
    header: dict[str, Any] = {}
    position = 0
    # safetensors lays out by descending alignment, then by name.
    for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        size = DTYPE_BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    length = len(canonical_json(header))
    members = (len(encode_meta(meta)), 8 + -(-length // 8) * 8 + position)
    return sum(BLOCK + padded(size) for size in members)


# ---- shards --------------------------------------------------------------------------------------


def write_shard(
    place: Place,
    samples: Iterable[EncodedSample],
    fingerprint: Fingerprint,
    made_by: dict[str, Any],
) -> ShardEntry:
    """Publish one shard and its sidecar. Samples come in sample-id order, at least one."""
    with opened_store(place) as store:
        rows: list[SidecarRow] = []
        with temporary_file(store.scratch, TEMPORARY) as (file, path):
            hashed = HashingFile(file)
            _write_tar(hashed, samples, rows)
        if not rows:
            path.unlink()
            raise ValueError("a shard needs at least one sample")
        sha256 = hashed.digest.hexdigest()
        tar = FileEntry(content_name("shard", sha256, ".tar"), hashed.position, sha256)
        name = content_name("shard", sha256, ".json")
        try:
            _check_layout(path, rows)
            sidecar = Sidecar(fingerprint, made_by, tuple(rows))
            data = sidecar_bytes(store, name, sidecar)
        except BaseException:
            path.unlink()
            raise
        store.publish(path, tar)
        return ShardEntry(tar, publish_sidecar(store, name, sidecar, data), len(rows))


def sidecar_bytes(store: Store, name: str, sidecar: Sidecar) -> bytes:
    """A new sidecar's bytes; those of the present one if it differs in `made_by` alone, because an
    older generation may list it by its hash."""
    data = encode_sidecar(sidecar)
    decode_sidecar(data, "new sidecar")  # what is published can be read: ids, order, layout
    try:
        present = store.read(name, LISTED_MAX_BYTES)
        old = decode_sidecar(present, name)
    except (FileNotFoundError, ShardError):
        return data
    same = (old.fingerprint.hash, old.rows) == (sidecar.fingerprint.hash, sidecar.rows)
    return present if same else data


def publish_sidecar(store: Store, name: str, sidecar: Sidecar, data: bytes) -> FileEntry:
    """Publish what `sidecar_bytes` gave, or what another run has published of that name since."""
    if not store.create(name, data):
        data = sidecar_bytes(store, name, sidecar)
        store.write(name, data)
    return FileEntry(name, len(data), sha256_hex(data))


def _write_tar(file: HashingFile, samples: Iterable[EncodedSample], rows: list[SidecarRow]) -> None:
    import webdataset as wds

    # encoder=False: bytes only, no pickling encoder can be reached. An integer mtime keeps PAX
    # headers out; with a float each member would carry one.
    writer = wds.TarWriter(
        file, encoder=False, mtime=0, user="", group="", mode=0o644, compress=False
    )
    begin = 0
    try:
        for sample in samples:
            members = dict(zip(MEMBERS, encode_record(sample.meta, sample.tensors), strict=True))
            writer.write({"__key__": sample.sample_id, **members})
            rows.append(_row(sample, members, begin))
            begin = rows[-1].end
    finally:
        writer.close()


def _check_layout(path: Path, rows: Sequence[SidecarRow]) -> None:
    """Raises ShardError unless webdataset laid the tar out as the sidecar says."""
    with open(path, "rb") as file:
        for row in rows:
            for name in MEMBERS:
                entry: MemberEntry = getattr(row, name)
                file.seek(entry.offset - BLOCK)
                if file.read(BLOCK) != canonical_header(f"{row.sample_id}.{name}", entry.bytes):
                    raise ShardError(
                        f"sample {row.sample_id}: this version of webdataset or Python writes tar "
                        "headers that the format does not allow"
                    )


def _row(sample: EncodedSample, members: dict[str, bytes], begin: int) -> SidecarRow:
    entries = {}
    for name, data in members.items():
        entries[name] = MemberEntry(begin + BLOCK, len(data), sha256_hex(data))
        begin += BLOCK + padded(len(data))
    return SidecarRow(
        sample_id=sample.sample_id,
        latent_id=sample.latent_id,
        text_ids=tuple(sample.text_ids),
        source_sha256=sample.meta.source_sha256,
        group=sample.meta.group,
        bucket=sample.meta.bucket,
        token_counts=tuple(sample.token_counts),
        json=entries["json"],
        safetensors=entries["safetensors"],
    )


class HashingFile:
    """The file object that the tar is written to: counts and hashes on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The temporary is closed by its owner."""


def sweep_temporaries(place: Place) -> int:
    """Remove what killed writers left in `.local/`; call it while holding the set's lock."""
    with opened_store(place) as store:
        scratch = store.scratch
    stale = [*scratch.glob(f"{TEMPORARY}*.tmp"), *scratch.glob(".*-????????.tmp")]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def adoptable_shards(
    place: Place,
    fingerprint: Fingerprint,
    listed: frozenset[str] = frozenset(),
    wanted: Container[str] | None = None,
) -> list[tuple[ShardEntry, Sidecar]]:
    """Whole shards with this fingerprint that are not among `listed` (tar names of a manifest).

    With `wanted` only those of which every sample id is in it; of the others no tar is read. Each
    is checked whole: the tar against its name, every fact of the sidecar against the tar. A tar
    whose sidecar is missing, or that is damaged, is left alone; the same bytes come again under its
    name.
    """
    with opened_store(place) as store:
        names = [name for name in store.names() or () if PurePath(name).match("shard-*.tar")]
        found = (
            _adoptable(store, name, fingerprint, wanted) for name in names if name not in listed
        )
        return [shard for shard in found if shard is not None]


def _adoptable(
    store: Store, name: str, fingerprint: Fingerprint, wanted: Container[str] | None
) -> tuple[ShardEntry, Sidecar] | None:
    side = name.removesuffix(".tar") + ".json"
    try:
        data = store.read(side, LISTED_MAX_BYTES)
        sidecar = decode_sidecar(data, side)
        if not sidecar.rows or sidecar.fingerprint.hash != fingerprint.hash:
            return None
        if wanted is not None and any(row.sample_id not in wanted for row in sidecar.rows):
            return None
        with store.open_unlisted(name, tar_bytes(sidecar.rows[-1].end)) as file:
            sha256, length, problems = scan_tar(
                file, name, sidecar.rows, partial(_check_adopted, fingerprint, name)
            )
    except (FileNotFoundError, ShardError):
        return None
    if problems or name != content_name("shard", sha256, ".tar"):
        return None
    tar = FileEntry(name, length, sha256)
    entry = FileEntry(side, len(data), sha256_hex(data))
    return ShardEntry(tar, entry, len(sidecar.rows)), sidecar


def _check_adopted(
    fingerprint: Fingerprint, name: str, row: SidecarRow, facts: bytes, tensors: bytes
) -> None:
    """No manifest vouches for the sidecar: each of its facts must follow from the record itself."""
    check_record(row, facts, tensors, fingerprint, None, f"{name}, sample {row.sample_id}")


# ---- the other files -----------------------------------------------------------------------------


def write_unconditional(
    place: Place, prompt_embeds: torch.Tensor, prompt_mask: torch.Tensor
) -> FileEntry:
    """Publish the embedding of the empty prompt: [T, D] bfloat16 and [T] bool."""
    from safetensors.torch import save

    data = save(
        {"prompt_embeds.0": prompt_embeds.contiguous(), "prompt_mask.0": prompt_mask.contiguous()}
    )
    return write_listed(place, "unconditional", data, ".safetensors")


def write_previews(place: Place, prompts: Sequence[PreviewPrompt]) -> FileEntry:
    """Publish preview prompts with their embeddings, at least one."""
    return write_listed(place, "previews", encode_previews(prompts), ".safetensors")


def write_rgb(place: Place, rgb: RgbMap) -> FileEntry:
    """Publish the linear map from latents to RGB."""
    return write_listed(place, "rgb", encode_rgb(rgb), ".json")


def write_retired(place: Place, sample_ids: Iterable[str]) -> FileEntry | None:
    """Publish the list of retired samples; None when it is empty."""
    names = sorted(set(sample_ids))
    return write_listed(place, "retired", canonical_json(names), ".json") if names else None


def write_listed(place: Place, kind: str, data: bytes, suffix: str) -> FileEntry:
    """Publish a small file under its content name."""
    sha256 = sha256_hex(data)
    entry = FileEntry(content_name(kind, sha256, suffix), len(data), sha256)
    with opened_store(place) as store:
        store.write(entry.name, data)
    return entry


def publish_manifest(place: Place, manifest: Manifest) -> str:
    """Publish a generation and point `manifest.json` at it; returns the generation's name.

    Raises ChangedRemotely when a remote set got another one since its manifest was read.
    """
    data = encode_manifest(manifest)
    decode_manifest(data, "new manifest")
    entry = write_listed(place, "manifest", data, ".json")
    with opened_store(place) as store:
        try:
            store.write(MANIFEST, data)
        except ChangedRemotely:
            if not _was_published(store, entry.name, manifest.previous):
                store.delete(entry.name)
            raise
    return entry.name


def _was_published(store: Store, name: str, previous: str | None) -> bool:
    """Whether `name`, made after `previous`, is one of the set's generations now: another run may
    have made it too, or the answer to this one's own write was lost, and more came since."""
    try:
        for generation in walk_generations(store):
            if generation.name in (name, previous):
                return generation.name == name
    except QwenLoraError:  # it cannot be told: an unlisted file does no harm
        return True
    return False


def build_manifest(
    place: Place,
    *,
    shards: Sequence[ShardEntry],
    fingerprint: Fingerprint,
    latent_channels: int,
    latent_scale: int,
    text_width: int,
    posterior: str,
    model: dict[str, Any],
    recipe: dict[str, Any],
    unconditional: FileEntry,
    retired: FileEntry | None = None,
    previous: str | None = None,
    previews: FileEntry | None = None,
    rgb: FileEntry | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> Manifest:
    """A manifest over published shards, in name order, with counts and histograms from sidecars."""
    ordered = tuple(sorted(shards, key=lambda entry: entry.tar.name))
    draft = Manifest(
        fingerprint=fingerprint,
        latent_channels=latent_channels,
        latent_scale=latent_scale,
        text_width=text_width,
        posterior=posterior,
        model=model,
        recipe=recipe,
        shards=ordered,
        unconditional=unconditional,
        counts={},
        histograms={},
        retired=retired,
        previous=previous,
        previews=previews,
        rgb=rgb,
    )

    def sidecars() -> Iterable[tuple[ShardEntry, Sidecar]]:
        for entry in ordered:
            yield entry, read_sidecar(place, entry)
            on_shard()

    counts, histograms = summarize_rows(sidecars(), read_retired(place, draft))
    return replace(draft, counts=counts, histograms=histograms)
