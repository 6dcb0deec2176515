"""Checks that the `Limits` of every guard share: a wrong limit is an error, never a default."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from weightproof.errors import PolicyError

FAMILIES = ("attn", "ffn", "expert", "router", "embed", "head", "conv", "other")
DEFAULT = "default"

FamilyLimits = Mapping[str, float]


def check_number(key: str, value: object, *, low: float = 0.0, high: float = math.inf, strict: bool = False) -> float:
    """Return `value` as a float within [low, high] (above `low` when `strict`).

    Raises:
        PolicyError: If it is not a finite number in that range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = " (write 1.0e-7 rather than 1e-7 in YAML)" if isinstance(value, str) else ""
        raise PolicyError(f"limit {key!r} must be a number, not {value!r}{hint}")
    if not math.isfinite(value) or value < low or value > high or (strict and value == low):
        above = f"above {low:g}" if strict else f"at least {low:g}"
        below = "" if math.isinf(high) else f" and at most {high:g}"
        raise PolicyError(f"limit {key!r} must be a finite number {above}{below}, not {value!r}")
    return float(value)


def check_count(key: str, value: object, *, low: int = 0) -> int:
    """Return `value` as an integer of at least `low`, or raise PolicyError."""
    number = check_number(key, value, low=float(low))
    if number != int(number):
        raise PolicyError(f"limit {key!r} must be a whole number, not {value!r}")
    return int(number)


def check_families(key: str, value: object, *, low: float = 0.0, strict: bool = False) -> dict[str, float]:
    """Return limits by family: a plain number holds for all; a mapping needs `default`.

    Raises:
        PolicyError: If a family is unknown, `default` is missing, or a number is out of range.
    """
    if not isinstance(value, Mapping):
        return {DEFAULT: check_number(key, value, low=low, strict=strict)}
    known = (DEFAULT, *FAMILIES)
    for family in value:
        if family not in known:
            near = difflib.get_close_matches(str(family), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"limit {key!r} names an unknown family {family!r}{hint} (known: {', '.join(known)})")
    if DEFAULT not in value:
        raise PolicyError(f"limit {key!r} gives no {DEFAULT!r} for the families that it does not name")
    return {
        str(family): check_number(f"{key}.{family}", item, low=low, strict=strict) for family, item in value.items()
    }


def check_choice(key: str, value: object, choices: tuple[str | None, ...]) -> str | None:
    """Return `value` if it is one of `choices`, or raise PolicyError."""
    if (value is not None and not isinstance(value, str)) or value not in choices:
        raise PolicyError(f"limit {key!r} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return value


def for_family(limits: FamilyLimits, family: str) -> float:
    """The limit of one family."""
    return limits.get(family, limits[DEFAULT])
