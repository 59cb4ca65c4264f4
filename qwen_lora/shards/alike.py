"""Which sets may become one: the same encoders, the same rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from qwen_lora.errors import InputError
from qwen_lora.shards.format import Manifest
from qwen_lora.shards.manifest import fingerprint_difference
from qwen_lora.shards.safe import printable

# What can be stripped, and the recipe's name for having it; a recipe that does not say has it.
PRIVACY = {"captions": "captions_in_shards", "source": "source_names"}
_SIZES = "img_size"  # the one part of a recipe that may grow
_FACTS = ("latent_channels", "latent_scale", "text_width", "posterior")


def check_alike(named: Sequence[tuple[str, Manifest]]) -> None:
    """Raises InputError, with the fields that differ, unless all records are interchangeable."""
    first_name, first = named[0]
    for name, other in named[1:]:
        lines = fingerprint_difference(first.fingerprint, other.fingerprint)
        lines += [
            f"{fact}: {getattr(first, fact)} -> {getattr(other, fact)}"
            for fact in _FACTS
            if getattr(first, fact) != getattr(other, fact)
        ]
        if lines:
            raise InputError(
                f"{name} was made with other encoders than {first_name}: {'; '.join(lines)}; only "
                "sets of one fingerprint can be merged"
            )


def join_recipes(
    named: Sequence[tuple[str, Manifest]],
    strip: Collection[str] = (),
    first_is_output: bool = False,
) -> dict[str, Any]:
    """One recipe for sets whose rules agree: all their resolutions; not that what is stripped.

    Stripping does not touch what an output holds already. Raises InputError with the rules that
    differ.
    """
    sizes: dict[Any, None] = {}
    joined: dict[str, Any] = {}
    for position, (name, manifest) in enumerate(named):
        recipe = dict.fromkeys(PRIVACY.values(), True) | manifest.recipe
        if position or not first_is_output:
            recipe |= dict.fromkeys((PRIVACY[each] for each in strip), False)
        sizes |= dict.fromkeys(_numbers(recipe.pop(_SIZES, []), name))
        if not position:
            joined = recipe
        differ = [
            f"{key}: {joined.get(key)} -> {recipe.get(key)}"
            for key in sorted({*joined, *recipe})
            if joined.get(key) != recipe.get(key)
        ]
        if differ:
            raise InputError(printable(_refusal(named[0][0], name, differ)))
    for key in PRIVACY.values():  # named only when something is left out, as precompute does
        if joined[key] is True:
            del joined[key]
    return {_SIZES: sorted(sizes), **joined}


def _numbers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise InputError(f"{name}: its recipe's {_SIZES} is no list of numbers")
    return value


def _refusal(first: str, name: str, differ: Sequence[str]) -> str:
    options = [option for option, key in PRIVACY.items() if any(key in line for line in differ)]
    advice = "only sets made by the same rules can be merged"
    if options:
        advice = f"--strip {','.join(options)} takes them out of what is added"
        if len(options) == len(differ):
            advice += "; into a set that holds them, they cannot be left out"
    return f"{name} was made by other rules than {first}: {'; '.join(differ)}; {advice}"
