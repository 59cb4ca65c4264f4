"""Settings from defaults, a YAML file, `--set` and options, in this order of precedence.

All problems are reported together, each with its key, its place and the nearest known key.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_lora.config import aliases
from qwen_lora.config.checks import check
from qwen_lora.config.field import Command
from qwen_lora.config.names import DICTS, SECTION, fields, nearest, value_of
from qwen_lora.config.schema import Settings
from qwen_lora.config.yaml_file import read_value, read_yaml
from qwen_lora.errors import InputError


class SettingsError(InputError):
    """The settings are wrong. Every process of a run finds the same."""


@dataclass
class _Layer:
    """One source of settings: values by dotted key, and what to call the place of each."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, value: Any, place: str) -> None:
        self.values[key] = value
        self.places[key] = place


def load_settings(
    command: Command,
    config: Path | None = None,
    set_options: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    notes: list[str] | None = None,
) -> Settings:
    """The settings of one command.

    config: a YAML file. set_options: `key=value` texts. options: values by dotted key, as the
    command line gives them; None and empty lists count as not given. An empty value in YAML or
    `--set` means the default. Notes (keys that were translated or are not needed) are appended to
    `notes`, or printed to stderr when it is None.

    Raises SettingsError, an InputError, that lists every problem.
    """
    problems: list[str] = []
    said: list[str] = []
    layers = [
        _yaml_layer(config, problems),
        _set_layer(set_options, problems),
        _option_layer(options or {}),
    ]
    for layer in layers:
        _translate(layer, problems, said)
        _drop_unknown(layer, problems)
    _refuse_conflicts(layers[1], layers[2], problems)
    merged = _merge(layers)
    settings, wrong = _validate(merged, problems)
    for finding in check(command, settings, explicit_keys(settings)):
        if finding.is_note:
            said.append(finding.line)
        elif wrong.isdisjoint(finding.keys):
            problems.append(merged.places.get(finding.keys[0], "") + finding.line)
    if problems:
        raise SettingsError(_together(problems))
    _tell(said, notes)
    return settings


def explicit_keys(settings: Settings) -> frozenset[str]:
    """The dotted keys that somebody gave a value, as opposed to defaults."""
    keys = {key for key in settings.model_fields_set if key != SECTION}
    if SECTION in settings.model_fields_set:
        keys |= {f"{SECTION}.{key}" for key in settings.data_config.model_fields_set}
    return frozenset(keys)


# ---- layers ----------------------------------------------------------------------------------


def _yaml_layer(config: Path | None, problems: list[str]) -> _Layer:
    layer = _Layer()
    if config is None:
        return layer
    tree = read_yaml(config)
    problems += [f"{config}: {problem}" for problem in tree.problems]
    section = tree.values.get(SECTION)
    for name in section if isinstance(section, dict) else ():
        if f"{SECTION}.{name}" in tree.values:
            problems.append(f"{config}: {SECTION}.{name}: given twice, with a dot and in {SECTION}")
    for key, value in _flat(tree.values).items():
        layer.add(key, value, f"{config}, line {tree.lines.get(key, 1)}: ")
    if SECTION in layer.values:  # not a mapping: _flat left it whole
        if layer.values[SECTION] is not None:
            problems.append(f"{layer.places[SECTION]}{SECTION}: must hold `key: value` lines")
        del layer.values[SECTION]
    return layer


def _set_layer(set_options: Iterable[str], problems: list[str]) -> _Layer:
    layer = _Layer()
    for text in set_options:
        key, separator, raw = text.partition("=")
        key = key.strip()
        if not separator or not key:
            problems.append(f"--set {text}: must be key=value")
            continue
        try:
            value = read_value(raw, key)
        except InputError as error:
            problems.append(str(error))
            continue
        if key == SECTION and not isinstance(value, Mapping):
            problems.append(f"--set {text}: {SECTION} holds keys; name one of them: {SECTION}.KEY=")
            continue
        flat = _flat({key: value}) if key == SECTION else {key: value}
        for name, part in flat.items():
            if layer.values.get(name, part) != part:
                problems.append(f"--set {name}: given twice, as {layer.values[name]} and {part}")
            layer.add(name, part, "--set ")
    return layer


def _option_layer(options: Mapping[str, Any]) -> _Layer:
    layer = _Layer()
    for key, value in options.items():
        if value is not None and value != [] and value != ():
            layer.add(key, list(value) if isinstance(value, tuple) else value, "")
    return layer


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """data_config's keys get their dotted names; dictionaries that are values stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == SECTION and isinstance(value, Mapping):
            flat.update({f"{SECTION}.{name}": part for name, part in value.items()})
        else:
            flat[key] = value
    return flat


def _translate(layer: _Layer, problems: list[str], said: list[str]) -> None:
    translated = aliases.translate(layer.values)
    problems += [_place_of(layer, line) + line for line in translated.problems]
    said += translated.notes
    for key, value in translated.values.items():
        layer.add(key, value, layer.places[translated.origin[key]])
    for key in aliases.KNOWN & layer.values.keys():
        del layer.values[key]


def _place_of(layer: _Layer, line: str) -> str:
    return layer.places.get(line.split(":")[0], "")


def _drop_unknown(layer: _Layer, problems: list[str]) -> None:
    for key in list(layer.values):
        if key in fields() or _dict_of(key) is not None:
            continue
        problems.append(
            f"{layer.places[key]}{key}: unknown key; the nearest known one is {nearest(key)}"
        )
        del layer.values[key]


def _dict_of(key: str) -> str | None:
    """`optimizer_args` for `optimizer_args.weight_decay`."""
    return next((name for name in DICTS if key.startswith(name + ".")), None)


def _refuse_conflicts(sets: _Layer, options: _Layer, problems: list[str]) -> None:
    for key in sets.values.keys() & options.values.keys():
        one, other = (_read_alone(key, layer.values[key]) for layer in (sets, options))
        if one != other:
            problems.append(f"{key}: --set says {_text(one)}, the option says {_text(other)}")


def _read_alone(key: str, value: Any) -> Any:
    """A value as its field reads it; as written when the field does not (reported later)."""
    if value is None:
        return fields()[key].get_default()
    try:
        settings = Settings.model_validate(_nested({key: value}))
    except ValidationError:
        return value
    return value_of(settings, key)


def _merge(layers: Sequence[_Layer]) -> _Layer:
    """Later layers win; an empty value brings the default back; `dict.key` sets one entry."""
    merged = _Layer()
    for layer in layers:
        for key, value in layer.values.items():
            whole = _dict_of(key)
            if whole is not None:
                before = merged.values.get(whole)
                entries = dict(before) if isinstance(before, Mapping) else {}
                entries[key.removeprefix(whole + ".")] = value
                merged.add(whole, entries, layer.places[key])
            elif value is None:
                merged.values.pop(key, None)
            else:
                merged.add(key, value, layer.places[key])
    return merged


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    return nested


# ---- problems --------------------------------------------------------------------------------


def _validate(merged: _Layer, problems: list[str]) -> tuple[Settings, frozenset[str]]:
    """The settings, with defaults for those keys (returned) whose values are no good."""
    try:
        return Settings.model_validate(_nested(merged.values)), frozenset()
    except ValidationError as error:
        by_key: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            key, inner = _key_of(item["loc"])
            reason = f"{inner} {_reason(item['type'], item['msg'])}".strip()
            if item["type"] != "value_error":  # those name the value themselves
                reason += f", not {_text(merged.values.get(key))}"
            by_key.setdefault(key, []).append(reason)
    for key, reasons in by_key.items():
        problems.append(f"{merged.places.get(key, '')}{key}: {_either(reasons)}")
    good = {key: value for key, value in merged.values.items() if key not in by_key}
    return Settings.model_validate(_nested(good)), frozenset(by_key)


def _key_of(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """The setting an error belongs to, and where inside its value."""
    size = 2 if loc[0] == SECTION and len(loc) > 1 else 1
    key = ".".join(str(part) for part in loc[:size])
    inner = [
        f"entry {part + 1}" if isinstance(part, int) else str(part)
        for part in loc[size:]
        if isinstance(part, int) or part.isidentifier()
    ]
    return key, " ".join(
        part for part in inner if part not in ("float", "int", "str", "constrained")
    )


_REASONS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "dict_type": "must hold `key: value` lines",
    "model_type": "must be a path, or path and weight",
    "string_type": "must be text",
    "path_type": "must be a path",
    "missing": "is missing",
    "extra_forbidden": "is not known",
    "string_pattern_mismatch": "must look like #ffffff",
    "too_short": "must have an entry",
}


def _reason(kind: str, message: str) -> str:
    known = _REASONS.get(kind)
    if known is not None:
        return known
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def _either(reasons: list[str]) -> str:
    """The alternatives of a union share one `, not VALUE`."""
    heads = [reason.rpartition(", not ")[0] or reason for reason in reasons]
    tail = reasons[-1][len(heads[-1]) :]
    return " or ".join(dict.fromkeys(heads)) + tail


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(part) for part in value) + "]"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _together(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the settings\n" + "\n".join(f"  {p}" for p in problems)


def _tell(said: list[str], notes: list[str] | None) -> None:
    unique = list(dict.fromkeys(said))
    if notes is not None:
        notes.extend(unique)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        for note in unique:
            print(f"note: {note}", file=sys.stderr)
