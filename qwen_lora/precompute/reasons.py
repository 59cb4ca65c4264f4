"""Why a file is not in the shards: the fixed words of report.jsonl."""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    # the file itself
    "unreadable",  # the system refuses to read it, or it went away
    "not_a_file",  # a named pipe, a socket, a device, a folder: never opened
    "unsupported_type",  # a picture by its name, of a type that no decoder here reads
    "heif_missing",  # HEIC or HEIF without the extra that reads it
    "source_changed",  # its bytes changed between two readings of one run
    "duplicate",  # the same bytes, captions and geometry as another file, which is in the shards
    # links
    "symlink_dangling",
    "symlink_loop",
    "symlink_outside",  # and data_config.follow_symlinks is off
    "symlink_repeated",  # too many links lead to one folder
    # its picture
    "undecodable",  # damaged, cut off, or not an image at all
    "too_many_pixels",  # told from the header
    "animated",  # several frames or pages
    "unknown_range",  # pixels of 32 bits
    "too_small",  # for the smallest bucket
    # its captions
    "caption_missing",
    "caption_empty",
    "caption_unreadable",  # not the JSON that it should be
    "caption_too_long",  # in bytes; too many tokens are cut off and counted
    "too_many_captions",
    "bad_encoding",  # not UTF-8, or characters that no text holds
    "image_missing",  # a metadata file names it
    # tars
    "tar_compressed",
    "tar_damaged",  # what lies before the damage is used
    "tar_repeated_name",
    "tar_several_images",  # in one sample
    "bad_name",  # of a member, leading out of the tar
    # encoding
    "nonfinite",  # a latent or an embedding
    "not_encoded",
]
