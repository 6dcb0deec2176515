"""From JSON back to our nouns, exactly: the other half of `weightproof.folders.jsonable`.

The types of the fields say what the JSON must hold; anything else is refused by its path. RFC 8785 writes
1.0 as 1 and has no NaN: fields of type float take both back.

    >>> from weightproof.folders.jsonable import to_jsonable
    >>> from weightproof.types import Measurement
    >>> one = Measurement("loss", "retain", "difference", float("inf"), 1.0, None)
    >>> from_jsonable(Measurement, to_jsonable(one)) == one
    True
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

from weightproof.errors import InputError
from weightproof.folders.jsonable import to_jsonable
from weightproof.types import Readings

T = TypeVar("T")
Decoder = Callable[[Any, Any, str], Any]

# Objects whose order counts, by their path in the readings.
ORDERED = (
    "tensors",
    "structure.modules",
    "structure.embedding_sizes",
    "matrices",
    "bulks",
    "circuits",
    "second_moments",
    "unmeasured",
    "edit.relative_delta",
)
OPTIONAL = ("curvature", "subspace", "health")
_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def readings_json(readings: Readings) -> dict[str, Any]:
    """All of some readings as JSON types; `readings_of` takes it back.

    Canonical JSON sorts the keys of objects, but measurements follow the order of the model: `order` keeps it.
    """
    content = to_jsonable(readings)
    for name in OPTIONAL:
        if content[name] is None:
            del content[name]  # an optional reading that nobody took leaves no trace
    content["order"] = {path: list(_at(content, path) or ()) for path in ORDERED}
    return content


def readings_of(found: object, where: str = "readings") -> Readings:
    """The readings that `readings_json` wrote.

    Raises:
        InputError: Naming the field (below `where`) that is missing, unknown, or of another kind.
    """
    content = dict(_object(found, where))
    order = from_jsonable(Mapping[str, tuple[str, ...]], content.pop("order", {}), f"{where}.order")
    for path, names in order.items():
        if path not in ORDERED:
            raise InputError(f"{where}.order: {path!r} is no part of readings that has an order")
        _arrange(content, path.split("."), names, where)
    return from_jsonable(Readings, content, where)


def _at(content: Mapping[str, Any], path: str) -> Any:
    """What lies at a path; None where an object on the way is null."""
    inner: Any = content
    for step in path.split("."):
        inner = None if inner is None else inner[step]
    return inner


def _arrange(content: dict[str, Any], path: Sequence[str], names: tuple[str, ...], where: str) -> None:
    """Put the object at a path into an order, in a copy of every object on the way."""
    inner = content.get(path[0])
    if inner is None and not names:
        return
    inner = dict(_object(inner, f"{where}.{path[0]}"))
    if len(path) > 1:
        _arrange(inner, path[1:], names, f"{where}.{path[0]}")
        content[path[0]] = inner
        return
    if len(names) != len(inner) or set(names) != inner.keys():
        raise InputError(f"{where}.order: its names of {path[0]} are not those that {path[0]} has")
    content[path[0]] = {name: inner[name] for name in names}


def from_jsonable(kind: type[T], found: object, where: str = "value") -> T:
    """A noun of type `kind` from what `to_jsonable` made of it.

    Args:
        kind: A dataclass, or any annotation that our nouns use.
        found: JSON types.
        where: Path of `found` in its document, for errors.

    Raises:
        InputError: Naming the path of what is missing, unknown, or of another kind.
    """
    return cast("T", _decode(kind, found, where))


def _decode(kind: Any, found: Any, where: str) -> Any:
    if kind is object or kind is Any:
        return found
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, found, where)
    if isinstance(kind, type) and kind in _SIMPLE:
        return _SIMPLE[kind](kind, found, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind, found, where)
    return _GENERIC[typing.get_origin(kind)](kind, found, where)


def _wrong(where: str, expected: str, found: object) -> InputError:
    return InputError(f"{where}: {expected} was expected, not {_shown(found)}")


def _shown(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def fields_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Name of each field of a dataclass -> its type, and whether it may be left out."""
    hints = typing.get_type_hints(kind)
    return {
        item.name: (
            hints[item.name],
            item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING,
        )
        for item in dataclasses.fields(kind)
    }


def _dataclass(kind: Any, found: Any, where: str) -> Any:
    known = fields_of(kind)
    items = _object(found, where)
    for name in items:
        if name not in known:
            raise InputError(f"{where}.{name}: this version knows no such field of {kind.__name__}")
    for name, (_, optional) in known.items():
        if name not in items and not optional:
            raise InputError(f"{where}.{name}: this field of {kind.__name__} is missing")
    return kind(**{name: _decode(known[name][0], value, f"{where}.{name}") for name, value in items.items()})


def _object(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise _wrong(where, "an object", found)
    return cast("Mapping[str, Any]", found)


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list | tuple):
        raise _wrong(where, "a list", found)
    return list(cast("list[Any]", found))


def _text(_kind: Any, found: Any, where: str) -> str:
    if not isinstance(found, str):
        raise _wrong(where, "text", found)
    return found


def _truth(_kind: Any, found: Any, where: str) -> bool:
    if not isinstance(found, bool):
        raise _wrong(where, "true or false", found)
    return found


def _integer(_kind: Any, found: Any, where: str) -> int:
    if isinstance(found, str) and found.removeprefix("-").isdecimal() and len(found) < 40:
        return int(found)
    if isinstance(found, bool) or not isinstance(found, int | float) or not float(found).is_integer():
        raise _wrong(where, "a whole number", found)
    return int(found)


def _float(_kind: Any, found: Any, where: str) -> float:
    if isinstance(found, str) and found in _NON_FINITE:
        return _NON_FINITE[found]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _wrong(where, "a number", found)
    return float(found)


def _enum(kind: Any, found: Any, where: str) -> Any:
    known = [member.value for member in kind]
    if found not in known:
        raise _wrong(where, f"one of {', '.join(map(str, known))}", found)
    return kind(found)


def _union(kind: Any, found: Any, where: str) -> Any:
    """`X | None`: the only unions that our nouns use."""
    kinds = [one for one in typing.get_args(kind) if one is not types.NoneType]
    return None if found is None else _decode(kinds[0], found, where)


def _mapping(kind: Any, found: Any, where: str) -> dict[str, Any]:
    _, value = typing.get_args(kind)
    return {name: _decode(value, item, f"{where}[{name!r}]") for name, item in _object(found, where).items()}


def _tuple(kind: Any, found: Any, where: str) -> tuple[Any, ...]:
    return tuple(
        _decode(typing.get_args(kind)[0], item, f"{where}[{index}]") for index, item in enumerate(_list(found, where))
    )


def _frozenset(kind: Any, found: Any, where: str) -> frozenset[Any]:
    return frozenset(_tuple(kind, found, where))


_SIMPLE: Mapping[Any, Decoder] = {str: _text, bool: _truth, int: _integer, float: _float}
_GENERIC: Mapping[Any, Decoder] = {
    types.UnionType: _union,
    typing.Union: _union,
    tuple: _tuple,
    frozenset: _frozenset,
    Mapping: _mapping,
}
