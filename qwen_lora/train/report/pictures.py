"""Pictures inside the page: small WebP copies as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 82
KEPT = 600  # encoded copies of previews, a few kB each


def data_uri(picture: Image, side: int) -> str:
    """At most `side` pixels on the longer side."""
    from PIL import Image

    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


class Copies:
    """Data URIs of picture files, made once each: a report is drawn often."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], str] = {}

    def of(self, path: Path, side: int) -> str | None:
        """None for a file that is not there or is no picture."""
        from PIL import Image

        try:
            key = (path, path.stat().st_mtime_ns, side)
            if key not in self._known:
                with Image.open(path) as picture:
                    self._known[key] = data_uri(picture, side)
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return self._known[key]
