"""One way from our nouns to JSON: what decisions, policies and certificates are digested as.

RFC 8785 (JSON canonicalisation) fixes key order and number format, but has no NaN and no infinity;
those become the strings "NaN", "Infinity" and "-Infinity", as do integers beyond 2^53.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, cast

import rfc8785
import torch

from weightproof.errors import InputError

MAX_EXACT_INTEGER = 2**53 - 1


def to_jsonable(value: object) -> Any:
    """Turn a noun into JSON types: dataclasses to objects, sets to sorted lists, non-finite to strings.

    Mapping keys become strings; a dataclass gives its fields by name.

    Raises:
        InputError: If the value holds something that has no JSON form (a tensor, a function).
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return to_jsonable(value.value)
    if isinstance(value, str | PurePath | torch.dtype):
        return _text(value)
    return _number(value) if isinstance(value, int | float) else _container(value)


def _text(value: str | PurePath | torch.dtype) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.as_posix() if isinstance(value, PurePath) else str(value)


def _number(value: float) -> int | float | str:
    if isinstance(value, int):
        return int(value) if abs(value) <= MAX_EXACT_INTEGER else str(int(value))
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def _container(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_jsonable(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {_key(key): to_jsonable(item) for key, item in items}
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable(item) for item in cast("Iterable[object]", value)), key=rfc8785.dumps)
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in cast("Iterable[object]", value)]
    raise InputError(f"a {type(value).__name__} has no JSON form; turn it into numbers or text first")


def _key(key: object) -> str:
    plain = to_jsonable(key)
    return plain if isinstance(plain, str) else str(plain)


def canonical_json(value: object) -> bytes:
    """RFC 8785 bytes of a noun: equal nouns give equal bytes on every machine."""
    return rfc8785.dumps(to_jsonable(value))


def json_digest(value: object) -> str:
    """Lower-case hex sha256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
