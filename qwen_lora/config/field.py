"""How a setting is declared: its default, its sentence, who reads it and what it changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

MAX_PROMPTS = 64  # of one setting
Command = Literal["precompute", "train", "both"]
Changes = Literal["shards", "result", "nothing"]


class Section(BaseModel):
    """A frozen group of settings that knows no other keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


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


def facts(field: FieldInfo) -> SettingFacts:
    """What `setting` declared about a field."""
    extra: Any = field.json_schema_extra
    return SettingFacts(command=extra["command"], changes=extra["changes"])


# ---- types that read what people write -------------------------------------------------------


# One slash is enough: a Path, as the command line gives it, has lost the second.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_FULL_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def _local_path(value: Any) -> Any:
    """`~` is the home folder; an empty name and a URL are errors, not odd folders."""
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str):
        return value
    if not text.strip():
        raise ValueError("a path is needed, this one is empty")
    if _URL.match(text):
        raise ValueError(f"{text!r} is a URL; a local folder is needed here")
    return Path(text).expanduser()


def _set_place(value: Any) -> Any:
    """A local folder, or the URL of a shard set as it was written. Secrets are kept out of URLs,
    which settings files, logs and reports repeat."""
    if isinstance(value, str) and _URL.match(value) and not _FULL_URL.match(value):
        raise ValueError(f"{value!r} has one slash after its colon; a URL has two")
    if not isinstance(value, str) or not _FULL_URL.match(value):
        return _local_path(value)
    parts = urlsplit(value)
    if "@" in parts.netloc:
        raise ValueError(
            f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]} holds credentials; leave them "
            "out: they are read from the environment, ~/.netrc or the hub's own store"
        )
    if parts.query or parts.fragment:
        shown = value.partition("?")[0].partition("#")[0]
        raise ValueError(f"{shown}: a shard set's URL has no ? or # part; name its folder")
    return value.rstrip("/")


def _as_list(value: Any) -> Any:
    """One value or several separated by commas, where a list is meant."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | Path) else value


def _none_is_empty(value: Any) -> Any:
    parts = _as_list(value)
    if isinstance(parts, list):
        return [part for part in parts if part != "none"]
    return parts


def _split_commas(value: Any) -> Any:
    return _as_list(value) if isinstance(value, str) and "," in value else value


def _one_prompt(value: Any) -> Any:
    """A text is one prompt, with its commas; several are a list."""
    return [value] if isinstance(value, str) else value


def _clean_prompts(prompts: list[str]) -> list[str]:
    """Stripped, each once, in their order."""
    stripped = [prompt.strip() for prompt in prompts]
    if "" in stripped:
        raise ValueError(f"entry {stripped.index('') + 1} is empty; take it out, or write a prompt")
    unique = list(dict.fromkeys(stripped))
    if len(unique) > MAX_PROMPTS:
        raise ValueError(f"{len(unique)} prompts are more than {MAX_PROMPTS}; leave some out")
    return unique


def _typed_leaves(value: Any) -> Any:
    """Arguments of unknown type: numbers, true and false are read as such, the rest is text."""
    if isinstance(value, dict):
        return {key: _typed_leaves(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_typed_leaves(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    readers: tuple[Callable[[str], Any], ...] = (int, float)
    for read in readers:
        try:
            return read(value)
        except ValueError:
            continue
    return value


LocalPath = Annotated[Path, BeforeValidator(_local_path)]
SetPlace = Annotated[Path | str, BeforeValidator(_set_place)]
ListOf = BeforeValidator(_as_list)
ListOrNone = BeforeValidator(_none_is_empty)
SplitCommas = BeforeValidator(_split_commas)
TypedLeaves = BeforeValidator(_typed_leaves)
Prompts = Annotated[list[str], BeforeValidator(_one_prompt), AfterValidator(_clean_prompts)]
