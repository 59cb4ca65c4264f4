"""`qwen-lora shards preview`: what a set shows, as a contact sheet and as a page.

Latents become pictures through the set's linear map, without torch or a model; or exactly, through
the VAE of a model that is named.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwen_lora.errors import InputError
from qwen_lora.hashing import sha256_hex
from qwen_lora.posix import write_atomic
from qwen_lora.progress import Progress
from qwen_lora.shards.format import Manifest
from qwen_lora.shards.preview_page import PageFacts, Shown, render
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.record import LATENT_NAMES, check_tensors, check_values, decode_meta
from qwen_lora.shards.safe import printable
from qwen_lora.shards.store import Place
from qwen_lora.shards.table import SampleTable

if TYPE_CHECKING:
    from PIL import Image

Painter = Callable[[NDArray[np.float32]], NDArray[np.uint8]]  # [C, h, w] -> RGB [H, W, 3]

PAGE_SIDE = 512  # pixels, of a picture on the page
SHEET_SIDE = 224  # and on the sheet, where there is room
MOST = 1000
_MOST_POSITIONS = 1 << 20  # of a latent that is drawn whole: the map needs 600 bytes for each
_LEAST_SIDE = 144  # pixels of a cell; smaller pictures are enlarged
_TEXT_LINES = 3  # under a picture of the sheet
_GAP = 8


@dataclass(frozen=True)
class PreviewReport:
    sheet: Path
    page: Path
    shown: int
    samples: int


def preview(
    place: Place, output: Path, *, vae: str | None = None, count: int = 48, seed: int | None = None
) -> PreviewReport:
    """Write `output`.png, a contact sheet, and `output`.html, a page that loads nothing.

    Shows `count` samples in turn from every bucket: the first ones, or with `seed` others. `vae`
    names a model whose VAE decodes them. Neither file holds a path or where the set lies. Raises
    InputError without a map and a VAE, and for an output that cannot be written; ShardError for a
    damaged set.
    """
    if not 1 <= count <= MOST:
        raise InputError(f"{count} samples cannot be shown; choose from 1 to {MOST}")
    output = output.with_suffix("") if output.suffix in (".png", ".html") else output
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent} is no folder; --output names files in one that exists")
    with ShardSet.open(place) as shards:
        paint, how = _painter(shards, vae)
        rows = choose(shards.table, count, seed)
        shown, cells = [], []
        with Progress("drawing", len(rows), "samples") as progress:
            for row in rows:
                one = _draw(shards, row, paint)
                shown.append(one[0])
                cells.append(one[1])
                progress.update()
        page = render(_facts(shards.manifest, shards.generation, how), shown)
    sheet = _sheet(cells, shown)
    report = PreviewReport(
        output.with_name(output.name + ".png"),
        output.with_name(output.name + ".html"),
        len(rows),
        len(shards),
    )
    try:
        write_atomic(report.sheet, sheet)
        write_atomic(report.page, page.encode("utf-8"))
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}") from None
    return report


def choose(table: SampleTable, count: int, seed: int | None = None) -> list[int]:
    """Rows of up to `count` samples, one of each bucket in turn, the largest bucket first; in the
    table's order, or in one that `seed` and the sample ids give."""
    order = list(range(len(table)))
    if seed is not None:
        order.sort(key=lambda row: sha256_hex(f"{seed} {table.sample_id[row]}".encode()))
    buckets: dict[tuple[int, ...], list[int]] = {}
    for row in order:
        buckets.setdefault(tuple(table.bucket[row].tolist()), []).append(row)
    queues: list[Iterator[int]] = [
        iter(rows) for _, rows in sorted(buckets.items(), key=lambda each: (-len(each[1]), each[0]))
    ]
    chosen: list[int] = []
    while queues and len(chosen) < count:
        alive = []
        for queue in queues:
            following = next(queue, None)
            if following is not None:
                chosen.append(following)
                alive.append(queue)
        queues = alive
    return chosen[:count]


# ---- pictures ------------------------------------------------------------------------------------


def _painter(shards: ShardSet, vae: str | None) -> tuple[Painter, str]:
    """What draws latents, and a sentence about it."""
    if vae is not None:
        from qwen_lora.shards.vae import vae_painter

        return vae_painter(shards.manifest, vae), "Decoded with the model's VAE."
    rgb = shards.rgb_map()
    if rgb is None:
        raise InputError(
            f"{shards.store.label} has no latent-to-RGB map; name the model whose VAE made it with "
            "--vae, or run precompute again, which adds a map"
        )

    def paint(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        thin = math.ceil((latents[0].size / _MOST_POSITIONS) ** 0.5)  # 1, unless it is huge
        return rgb.apply(latents[:, :: max(1, thin), :: max(1, thin)])

    return paint, (
        "The set's linear map turns latents into colours: shapes and colours are near, fine detail "
        "is not drawn. The VAE draws the images themselves."
    )


def read_latents(shards: ShardSet, row: int) -> NDArray[np.float32]:
    """A row's normalised latents [C, h, w] (the posterior's mean where there are two), checked."""
    what = shards.where(row)
    tensors = shards.read_bytes(row)[1]
    name = LATENT_NAMES[shards.manifest.posterior][0]
    entry = check_tensors(tensors, shards.shape(row), what)[name]
    check_values(tensors, {name: entry}, what)
    halves = np.frombuffer(tensors, np.uint8, entry.end - entry.begin, entry.begin).view("<f2")
    return halves.reshape(entry.shape).astype(np.float32)


def _draw(shards: ShardSet, row: int, paint: Painter) -> tuple[Shown, Image.Image]:
    """For the page, and for the sheet."""
    from PIL import Image

    meta = decode_meta(shards.read_bytes(row)[0], shards.where(row))
    picture = Image.fromarray(paint(read_latents(shards, row)))
    picture.thumbnail((PAGE_SIDE, PAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=85)
    shown = Shown(
        sample_id=shards.table.sample_id[row],
        captions=tuple(meta.captions or ()),
        bucket=meta.bucket,
        tokens=shards.table.tokens_of(row),
        webp=buffer.getvalue(),
        size=picture.size,
    )
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    return shown, picture


def _facts(manifest: Manifest, generation: str, how: str) -> PageFacts:
    return PageFacts(
        generation=generation,
        model=str(manifest.model.get("id") or "unknown"),
        fingerprint=manifest.fingerprint.hash[:12],
        samples=manifest.counts.get("samples", 0),
        images=manifest.counts.get("images", 0),
        captions=manifest.counts.get("captions", 0),
        buckets=manifest.histograms.get("buckets", {}),
        how=how,
    )


# ---- the sheet -----------------------------------------------------------------------------------


def _sheet(cells: list[Image.Image], shown: list[Shown]) -> bytes:
    """A PNG: pictures in rows, under each its caption, bucket and the beginning of its id."""
    from PIL import Image, ImageDraw, ImageOps

    from qwen_lora.grid import MAX_SIDE, load_font, wrapped

    columns = max(1, min(len(cells), round((1.5 * len(cells)) ** 0.5)))
    largest = max((max(picture.size) for picture in cells), default=0)
    side = min(SHEET_SIDE, max(_LEAST_SIDE, largest), MAX_SIDE // columns - _GAP)
    font = load_font(max(10, side // 18))
    line = max(13, side // 14)
    step = (side + _GAP, side + _TEXT_LINES * line + 2 * _GAP)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, max(1, rows) * step[1] + _GAP), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, one) in enumerate(zip(cells, shown, strict=True)):
        left = _GAP + number % columns * step[0]
        top = _GAP + number // columns * step[1]
        fitted = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill="#ecede9")
        at = (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2)
        sheet.paste(fitted, at)
        caption = printable(" | ".join(one.captions)) or "(no captions stored)"
        texts = wrapped(caption, font, side, _TEXT_LINES - 1)
        texts += [f"{one.bucket[0]} x {one.bucket[1]}  {one.sample_id[:8]}"]
        for index, text in enumerate(texts):
            draw.text((left, top + side + 2 + index * line), text, fill="#202020", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
