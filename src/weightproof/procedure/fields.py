"""A mapping that somebody wrote, with the place it stands at: each value is asked for by name and type.

Every error names the place (`edits[1].bits`), what was found there and what belongs there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin

from weightproof.errors import InputError

_WORDS: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "nothing",
}


def nearest(name: object, known: Collection[str]) -> str:
    """`; did you mean 'x'? (known: ...)` for an error message."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(known) or 'none'})"


class Fields:
    """One mapping of a recipe.

    Args:
        values: What stands there.
        place: Where: `edits[1]`, or nothing for the whole recipe.

    Raises:
        InputError: If it is no mapping of names to values.

    Example:
        >>> Fields({"bits": 4}, "edits[0]").get("bits", int)
        4
    """

    def __init__(self, values: object, place: str = "") -> None:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise InputError(f"{place or 'a recipe'} must be a mapping of names to values, not {values!r}")
        self.values = cast("Mapping[str, Any]", values)
        self.place = place

    def at(self, key: str) -> str:
        """The place of a key."""
        return f"{self.place}.{key}" if self.place else key

    def require_known(self, known: Collection[str]) -> None:
        """Refuse a key that does not belong here."""
        for key in self.values:
            if key not in known:
                raise InputError(f"{self.at(key)} is unknown{nearest(key, known)}")

    def get(self, key: str, hint: Any, default: Any = None) -> Any:
        """The value of a key as the type asks for it; the default where it is not written."""
        return as_type(self.values[key], hint, self.at(key)) if key in self.values else default

    def choice(self, key: str, known: Collection[str], default: str) -> str:
        """One of a few words."""
        found = self.get(key, str, default)
        if found not in known:
            raise InputError(f"{self.at(key)} is {found!r}, which is unknown{nearest(found, known)}")
        return found

    def fields(self, key: str) -> Fields:
        """The mapping under a key; an empty one where it is not written."""
        return Fields(self.values.get(key) or {}, self.at(key))

    def items(self, key: str) -> list[Fields]:
        """The list of mappings under a key."""
        found = self.values.get(key)
        if not isinstance(found, list) or not found:
            raise InputError(f"{self.at(key)} must be a list with at least one entry, not {found!r}")
        return [Fields(one, f"{self.at(key)}[{index}]") for index, one in enumerate(found)]


def as_type(value: Any, hint: Any, place: str) -> Any:
    """A value of YAML as a type hint asks for it: lists become tuples, text a path, whole numbers a float.

    A hint that says nothing of plain values lets everything through.

    Raises:
        InputError: Naming the place, the type and the value.
    """
    for one in _alternatives(hint):
        fits, converted = _converted(value, one, place)
        if fits:
            return converted
    words = " or ".join(dict.fromkeys(_in_words(one) for one in _alternatives(hint)))
    raise InputError(f"{place} must be {words}, not {value!r}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (tuple, list, Sequence):
        inner = [one for one in get_args(hint) if one is not Ellipsis]
        return f"a list ({_in_words(inner[0])} each)" if inner else "a list"
    return _WORDS.get(hint, "a mapping" if _is_mapping(hint) else str(hint))


def _is_mapping(hint: Any) -> bool:
    return hint is dict or get_origin(hint) in (dict, Mapping)


def _converted(value: Any, hint: Any, place: str) -> tuple[bool, Any]:
    """Whether a value fits a plain hint, and the value as it asks for it."""
    if get_origin(hint) in (tuple, list, Sequence):
        return _many(value, hint, place)
    if _is_mapping(hint):
        return isinstance(value, Mapping), value
    return _PLAIN[hint](value) if hint in _PLAIN else (True, value)


def _whole(value: Any) -> tuple[bool, Any]:
    return isinstance(value, int) and not isinstance(value, bool), value


def _path(value: Any) -> tuple[bool, Any]:
    return (True, Path(value)) if isinstance(value, str) else (False, None)


def _number(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):  # YAML 1.1 takes 1e-3, which lacks a point, for text
        try:
            value = float(value)
        except ValueError:
            return False, None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return fits, float(value) if fits else None


def _many(value: Any, hint: Any, place: str) -> tuple[bool, Any]:
    inner = [one for one in get_args(hint) if one is not Ellipsis]
    if isinstance(value, str) and inner and inner[0] is str:
        return True, (value,)
    if not isinstance(value, list):
        return False, None
    return True, tuple(as_type(one, inner[0], f"{place}[{i}]") if inner else one for i, one in enumerate(value))


_PLAIN: Mapping[object, Callable[[Any], tuple[bool, Any]]] = {
    NoneType: lambda value: (value is None, None),
    bool: lambda value: (isinstance(value, bool), value),
    str: lambda value: (isinstance(value, str), value),
    int: _whole,
    float: _number,
    Path: _path,
}
