"""The model families, found by name or by a diffusers class name. Imports no torch."""

from __future__ import annotations

from qwen_lora.errors import InputError
from qwen_lora.families.base import Family
from qwen_lora.families.qwen_image import QwenImage

FAMILIES: tuple[Family, ...] = (QwenImage(),)


def family_by_name(name: str) -> Family:
    """Raises InputError when this version does not know the family."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise InputError(f"unknown model family {name!r}; this version knows: {known}")


def family_by_class(class_name: str) -> Family:
    """The family whose pipeline or transformer class in diffusers has this name."""
    for family in FAMILIES:
        if class_name in (family.pipeline_class, family.transformer_class):
            return family
    known = ", ".join(f"{family.pipeline_class} ({family.name})" for family in FAMILIES)
    raise InputError(f"model class {class_name!r} is not supported; this version knows: {known}")
