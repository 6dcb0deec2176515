"""Kinds of change in words, as options and recipes declare them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from weightproof.errors import InputError

if TYPE_CHECKING:
    from weightproof.kinds import Kind

KINDS = "int8, int4, quantize:bits=4,granularity=group,group_size=64, cast:bfloat16, prune:0.5, preserving, "
KINDS += "lora_merge:FOLDER (of the adapter), unknown"
_INT = re.compile(r"int(\d{1,2})")


def kind_from_words(text: str, label: str = "kind") -> Kind:
    """The kind of change that a few words declare.

    Args:
        text: Such as `int8`.
        label: Where it was written, for errors.

    Raises:
        InputError: If it is none of the kinds that can be declared in words.

    Example:
        >>> kind_from_words("int8")
        Quantize(bits=8, granularity='channel', group_size=None)
    """
    from weightproof.kinds import (
        Cast,
        LoraMerge,
        Prune,
        Quantize,
        parse_kind,
    )  # heavy: `--help` asks for the words alone

    name, _, rest = text.partition(":")
    try:
        if match := _INT.fullmatch(text):
            return Quantize(int(match[1]))
        if name == "quantize":
            return Quantize(**_settings(rest))
        if name == "cast":
            return Cast(rest)
        if name == "prune":
            return Prune(float(rest))
        if name == "lora_merge" and rest:
            return LoraMerge(rest)
        if not rest:
            return parse_kind(name)
    except (TypeError, ValueError) as error:
        raise InputError(f"{label} {text}: {error}. Give one of {KINDS}") from error
    raise InputError(f"{label} {text} is unknown: give one of {KINDS}")


def _settings(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name.strip(): int(value) if value.strip().isdecimal() else value.strip() for name, _, value in pairs}
