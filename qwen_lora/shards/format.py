"""The shard format, version 1, as plain types: ids, records, sidecars, manifests. Imports no torch.

    manifest.json, manifest-<sha256[:12]>.json   a generation: shards, fingerprint, recipe, counts
    shard-<sha256[:12]>.tar                      plain WebDataset: <sample id>.json + .safetensors
    shard-<sha256[:12]>.json                     sidecar: one column a fact, one row a sample
    unconditional-<sha256[:12]>.safetensors      the embedding of " "
    rgb-<sha256[:12]>.json                       the linear map from latents to RGB
    previews-<sha256[:12]>.safetensors           preview prompts with their embeddings

Every size and box is [height, width] and [top, left, bottom, right] in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen_lora.hashing import hash_json

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
NAME_HEX = 12  # hex digits of a content hash inside a file name
UNCONDITIONAL_CAPTION = " "  # what Qwen-Image's pipeline uses as the empty prompt


@dataclass(frozen=True, order=True)
class Geometry:
    """How one source image becomes one bucket: crop first, then resize, then flip."""

    crop_box: tuple[int, int, int, int]  # in the EXIF-oriented source, before resizing
    bucket: tuple[int, int]  # after resizing
    flipped: bool = False

    def facts(self) -> list[Any]:
        return [list(self.crop_box), list(self.bucket), self.flipped]


def latent_id(source_sha256: str, geometry: Geometry, vae_fingerprint: str) -> str:
    """64 hex digits that name a latent: its pixels' origin, its geometry, its encoder."""
    return hash_json([source_sha256, geometry.facts(), vae_fingerprint])


def text_id(caption: str, text_fingerprint: str) -> str:
    """64 hex digits that name an embedding: the exact caption and its encoder. Control images join
    the list in families that show them to the text encoder."""
    return hash_json([caption, [], text_fingerprint])


def sample_id(latent: str, texts: list[str]) -> str:
    """32 hex digits: the tar key of a record."""
    return hash_json([latent, texts])[:32]


@dataclass(frozen=True)
class RecordMeta:
    """The JSON member of a record."""

    captions: list[str] | None  # None with --no-captions
    source: str | None  # relative POSIX name; None with --no-source-names
    source_sha256: str
    original_size: tuple[int, int]  # EXIF-oriented
    crop_box: tuple[int, int, int, int]
    flipped: bool
    bucket: tuple[int, int]
    truncated_tokens: list[int]  # per caption
    group: str  # first folder; "" at the top


@dataclass(frozen=True)
class FileEntry:
    """A published file: bare name, length and content hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    tar: FileEntry
    sidecar: FileEntry
    samples: int


@dataclass(frozen=True)
class Fingerprint:
    """What shapes the tensors. Two sets with equal hashes hold interchangeable records.

    `vae` and `text` hold the facts of either encoder (weights, config keys, dtypes, template,
    limits, resize algorithm, ...), JSON values only.
    """

    family: str
    vae: dict[str, Any]
    text: dict[str, Any]
    format_major: int = FORMAT_MAJOR

    @property
    def vae_hash(self) -> str:
        return hash_json([self.format_major, self.family, self.vae])

    @property
    def text_hash(self) -> str:
        return hash_json([self.format_major, self.family, self.text])

    @property
    def hash(self) -> str:
        return hash_json([self.vae_hash, self.text_hash])


@dataclass(frozen=True)
class Manifest:
    """One generation of a shard set."""

    fingerprint: Fingerprint
    latent_channels: int
    latent_scale: int
    text_width: int
    posterior: str  # "mode" or "mean_std"
    model: dict[str, Any]  # id and revision the set was made with; informative, never compared
    recipe: dict[str, Any]  # resolutions, bucket, crop and flip rules
    shards: tuple[ShardEntry, ...]
    unconditional: FileEntry
    counts: dict[str, int]  # samples, images, captions, retired, bytes
    histograms: dict[str, dict[str, int]]  # buckets "HxW", token lengths, groups
    previews: FileEntry | None = None
    rgb: FileEntry | None = None
    retired: FileEntry | None = None  # list of retired sample ids
    previous: str | None = None  # file name of the generation before
    required_features: tuple[str, ...] = field(default=())
    format_major: int = FORMAT_MAJOR
    format_minor: int = FORMAT_MINOR
