"""Kohya's folder names: `10_cat` is the group `cat`, seen 10 times an epoch."""

from __future__ import annotations

import re

# Up to 4 digits, so that a date (`20240131_trip`) is no weight.
_NAME = re.compile(r"([0-9]{1,4})_(.+)", re.DOTALL)


def parse_kohya(group: str) -> tuple[float, str] | None:
    """(weight, name) of a folder such as `10_cat`, or None for any other name."""
    match = _NAME.fullmatch(group)
    if match is None:
        return None
    return float(match[1]), match[2]
