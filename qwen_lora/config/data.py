"""data_config: the images, their captions and their geometry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwen_lora.config.field import ListOf, LocalPath, Section, setting


class DataConfig(Section):
    """data_config: the images, their captions and their geometry (stage 1), and caption dropout."""

    img_dir: LocalPath | None = setting(
        None,
        "Folder of captioned images, or WebDataset tars of them.",
        command="precompute",
        changes="nothing",
    )
    img_size: Annotated[list[Annotated[int, Field(ge=16)]], ListOf] = setting(
        [1024],
        "Target resolution: buckets have about this many pixels squared; one number or a list.",
        command="precompute",
        changes="shards",
        min_length=1,
    )
    caption_dropout_rate: float = setting(
        0.1,
        "Share of visits that see the empty prompt instead of the caption.",
        command="train",
        changes="result",
        ge=0,
        le=1,
    )
    random_ratio: bool = setting(
        False,
        "Crop each image to 16:9, 4:3 or 1:1, drawn from the image's own hash and the seed.",
        command="precompute",
        changes="shards",
    )
    caption_type: Literal["auto", "txt", "caption", "json"] = setting(
        "auto",
        "Which sidecar holds the caption: .txt, .caption, .json, or whichever is there.",
        command="precompute",
        changes="shards",
    )
    caption_source: Literal["error", "sidecar", "metadata"] = setting(
        "error",
        "Which wins when an image has both a sidecar and a row in a metadata file.",
        command="precompute",
        changes="shards",
    )
    caption_lines: Literal["join", "variants", "first"] = setting(
        "join",
        "A caption file of several lines: one caption, one caption a line, or the first line.",
        command="precompute",
        changes="shards",
    )
    trigger_word: str = setting(
        "",
        "Put before every caption, followed by a comma.",
        command="precompute",
        changes="shards",
    )
    empty_caption: Literal["skip", "unconditional"] = setting(
        "skip",
        "An image whose caption is empty: skip and report it, or train it without a prompt.",
        command="precompute",
        changes="shards",
    )
    kohya_repeats: bool = setting(
        False,
        "Read folder names such as 10_cat as group cat with weight 10.",
        command="both",
        changes="result",
    )
    group_weights: dict[str, Annotated[float, Field(gt=0)]] = setting(
        {},
        "Visits an epoch of each group (first folder); groups not named have weight 1.",
        command="train",
        changes="result",
    )
    bucket_step: int | None = setting(
        None,
        "Bucket sides are multiples of this; empty: 64 px, 16 below 512 px.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    square: bool = setting(
        False,
        "One square bucket per resolution instead of aspect-ratio buckets.",
        command="precompute",
        changes="shards",
    )
    min_aspect: float = setting(
        0.25,
        "Narrowest bucket, width / height.",
        command="precompute",
        changes="shards",
        gt=0,
        le=1,
    )
    max_aspect: float = setting(
        4.0,
        "Widest bucket, width / height.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    upscale: bool = setting(
        False,
        "Enlarge images that are smaller than their bucket instead of using a smaller one.",
        command="precompute",
        changes="shards",
    )
    flip: Literal["none", "both"] = setting(
        "none",
        "both: cache every image and its mirror image.",
        command="precompute",
        changes="shards",
    )
    resize: Literal["fast", "exact"] = setting(
        "fast",
        "fast: OpenCV area down, Lanczos up; exact: Pillow Lanczos.",
        command="precompute",
        changes="shards",
    )
    jpeg_scaled_decode: bool = setting(
        False,
        "Decode JPEGs of four times the target size and more at a half, a quarter or an eighth of "
        "theirs: faster, pixels differ by 1 of 255 on average, by 44 at hard edges.",
        command="precompute",
        changes="shards",
    )
    alpha_background: str = setting(
        "#ffffff",
        "Colour behind transparent pixels, in quotes.",
        command="precompute",
        changes="shards",
        pattern=r"^#[0-9a-fA-F]{6}$",
    )
    animated: Literal["refuse", "first"] = setting(
        "refuse",
        "Animations and multi-page files: report them, or take the first frame.",
        command="precompute",
        changes="shards",
    )
    max_pixels: int = setting(
        100_000_000,
        "Larger images are refused before they are decoded.",
        command="precompute",
        changes="shards",
        gt=0,
    )
    follow_symlinks: bool = setting(
        False,
        "Follow links that lead out of the dataset folder.",
        command="precompute",
        changes="shards",
    )
