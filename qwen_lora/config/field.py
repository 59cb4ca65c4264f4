"""How a setting is declared: its default, its sentence, who reads it and what it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

Command = Literal["precompute", "train", "both"]
Changes = Literal["shards", "result", "nothing"]


@dataclass(frozen=True)
class SettingFacts:
    """command: which stage reads it. changes: what a rerun with another value would make different:
    the shards, the training result, or nothing (batching of work, logging, places)."""

    command: Command
    changes: Changes


def setting(default: Any, text: str, *, command: Command, changes: Changes, **checks: Any) -> Any:
    """A pydantic field; `checks` are pydantic's own constraints (gt, ge, le, ...)."""
    return Field(
        default=default,
        description=text,
        json_schema_extra={"command": command, "changes": changes},
        **checks,
    )
