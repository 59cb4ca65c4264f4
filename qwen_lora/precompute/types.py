"""What the parts of stage 1 hand to each other.

scan     -> Candidate | Skip          names and captions; no pixel is read
inspect  -> Inspection | Skip         sha256 and oriented size, from bytes and header
geometry -> tuple[Geometry, ...]      buckets, crops, flips
worklist -> WorkItem, cut into shards
decode   -> uint8 pixels [H, W, 3] in bucket size
encode   -> records -> shards
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qwen_lora.shards.format import Geometry


@dataclass(frozen=True)
class ImageSource:
    """Where an image's bytes are: a regular file, or a member of a tar."""

    name: str  # relative POSIX name, unique in the dataset; "a.tar/0001.jpg" for a tar's member
    path: Path  # the file, or the tar
    offset: int | None = None  # of the member's data in the tar
    size: int | None = None  # of the member's data in the tar


@dataclass(frozen=True)
class Candidate:
    """An image with its captions (after trigger word, line mode and stripping)."""

    image: ImageSource
    captions: tuple[str, ...]  # at least one; "" only with empty_caption = unconditional
    group: str = ""


@dataclass(frozen=True)
class Skip:
    """A file that was seen and is not in the shards; one line of report.jsonl."""

    name: str
    reason: str  # a short fixed word: undecodable, too_many_pixels, caption_missing, ...
    detail: str = ""


@dataclass
class Scan:
    """What a folder holds. seen = candidates + skips; ignored files are counted by kind."""

    candidates: list[Candidate]
    skips: list[Skip]
    ignored: dict[str, int] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)  # one line each, for the person


@dataclass(frozen=True)
class Inspection:
    """A candidate whose header was read."""

    candidate: Candidate
    source_sha256: str
    original_size: tuple[int, int]  # [height, width], EXIF-oriented


@dataclass(frozen=True)
class WorkItem:
    """One record to be made."""

    sample_id: str
    latent_id: str
    text_ids: tuple[str, ...]
    inspection: Inspection
    geometry: Geometry
    token_counts: tuple[int, ...]
    truncated_tokens: tuple[int, ...]
    predicted_bytes: int  # of its two tar members with headers
