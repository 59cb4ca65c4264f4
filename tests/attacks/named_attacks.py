"""What a named attack on whoever opens a shard set is, and how one is added to a list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forged_sets import Forgery


@dataclass(frozen=True)
class Attack:
    """`outside`: the change lies outside every member, so that reading may go on unharmed.
    `text`: it is a text that nobody may act on; reading gives it back, verify refuses the ids."""

    name: str
    make: Callable[[Path, Path], None]  # (folder of the set, canary)
    outside: bool = False
    text: bool = False


def adder_to(attacks: list[Attack]) -> Callable[..., Callable[[Any], Any]]:
    """Makes the decorator with which each of `attacks` is written."""

    def attack(name: str, outside: bool = False, text: bool = False) -> Callable[[Any], Any]:
        def register(make: Callable[[Forgery, Path], dict[str, bytes] | None]) -> Any:
            def publish(folder: Path, canary: Path) -> None:
                forgery = Forgery(folder)
                forgery.publish(**(make(forgery, canary) or {}))

            attacks.append(Attack(name, publish, outside, text))
            return make

        return register

    return attack
