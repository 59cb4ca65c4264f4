"""How a shard's tar is laid out: canonical headers, member order, zero padding, one end."""

from __future__ import annotations

import tarfile

MEMBERS = ("json", "safetensors")  # in tar order
BLOCK = 512
TAR_RECORD = 20 * BLOCK  # a tar's length is a multiple of this


def padded(size: int) -> int:
    """A member's length in whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def tar_bytes(end: int) -> int:
    """Length of the tar whose last member, with its padding, ends at `end`: two zero blocks more,
    filled up to a whole record."""
    return -(-(end + 2 * BLOCK) // TAR_RECORD) * TAR_RECORD


def canonical_header(name: str, size: int) -> bytes:
    """The 512 bytes that a member's header must be: plain file, mode 644, nobody, time 0."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT)
