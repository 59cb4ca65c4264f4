"""Reading a YAML file as text: every scalar stays the string that was written.

The field's type reads it later, so `no`, `on`, `1e-4` and `1_000` mean what they say. Only
mappings, lists and scalars exist here: no tags, no objects. A plain empty value, `~` or `null` is
None.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen_lora.errors import InputError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
_NULLS = frozenset(["", "~", "null", "Null", "NULL"])


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that gives no plain scalar a type."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the class attribute that PyYAML reads


@dataclass
class TextTree:
    """What a file says: nested dicts, lists and strings; where each dotted key stands."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # dotted key -> line, from 1
    problems: list[str] = field(default_factory=list)


def read_yaml(path: Path) -> TextTree:
    """Read a settings file. Raises InputError when it is no YAML mapping; duplicate keys and tags
    are `problems` of the result, to be reported with the others."""
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise InputError(f"settings file {path} is larger than 1 MiB; it is no settings file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read settings file {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"settings file {path} is not UTF-8 text: {error.reason}") from error
    with _as_input_error(f"settings file {path}"):
        node = yaml.compose(text, Loader=_TextLoader)
    tree = TextTree()
    if node is None:
        return tree
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"settings file {path} is not a list of `key: value` lines")
    tree.values = _Walk(tree).mapping(node, "")
    return tree


def read_value(text: str, name: str) -> Any:
    """The value of one `--set key=value`, in YAML's own short form: `[a, b]`, `{a: 1}`, text."""
    stripped = text.strip()
    if stripped[:1] not in ("[", "{", '"', "'"):
        return None if stripped in _NULLS else stripped
    tree = TextTree()
    with _as_input_error(f"--set {name}"):
        node = yaml.compose(stripped, Loader=_TextLoader)
    value = _Walk(tree).value(node, name)
    if tree.problems:
        raise InputError(f"--set {tree.problems[0]}")
    return value


@contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).split("\n")[0] or "nested too deeply"
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{what}{where} is not YAML: {reason}") from error


class _Walk:
    """Nodes to dicts, lists and strings; refuses cycles and blow-ups through aliases."""

    def __init__(self, tree: TextTree) -> None:
        self._tree = tree
        self._open: set[int] = set()
        self._count = 0

    def value(self, node: Any, key: str) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise InputError("the settings hold more than 100,000 values; is an alias repeated?")
        if id(node) in self._open:
            self._tree.problems.append(f"{key}: an alias that contains itself")
            return None
        if node.tag.startswith("!") or (
            node.tag.startswith("tag:yaml.org") and not node.tag.endswith((":str", ":map", ":seq"))
        ):
            self._tree.problems.append(f"{key}: tags such as {node.tag} are not read here")
            return None
        if isinstance(node, yaml.ScalarNode):
            return None if node.style is None and node.value in _NULLS else str(node.value)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(child, f"{key}[{i}]") for i, child in enumerate(node.value)]
            return self.mapping(node, key + ".")
        finally:
            self._open.discard(id(node))

    def mapping(self, node: Any, prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._tree.problems.append(f"line {line}: a key must be plain text")
                continue
            name = str(key_node.value)
            key = prefix + name
            if name in values:
                first = self._tree.lines[key]
                self._tree.problems.append(f"{key}: given twice, on lines {first} and {line}")
                continue
            self._tree.lines[key] = line
            values[name] = self.value(value_node, key)
        return values
