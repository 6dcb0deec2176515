"""The contrast of two deltas, and how alike they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weightproof.differences.factors import Part, added, frobenius, inner, scaled_part
from weightproof.errors import InputError

Parts = Mapping[str, Part]
MODES = ("difference", "bisector")


def contrasted(
    positive: Parts, about_positive: Mapping[str, Any], negative: Parts, about_negative: Mapping[str, Any], mode: str
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Parts and metadata of a contrast; see `Delta.contrast`.

    Raises:
        InputError: An unknown mode, a matrix of two shapes, or sides that were made for different weights.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    base = _common_base(about_positive, about_negative)
    sides = sides_of(positive, negative)
    weights = 1.0, 1.0
    if mode == "bisector":
        weights = _bisector(sides)
    metadata = {
        "mode": "contrast",
        "contrast": mode,
        "source": [about_positive.get("source"), about_negative.get("source")],
        "base": base,
        "dtype": about_positive.get("dtype", "float32"),
        "sides": sides,
        "not_included": {**about_negative.get("not_included", {}), **about_positive.get("not_included", {})},
        "notes": list(dict.fromkeys([*about_positive.get("notes", ()), *about_negative.get("notes", ())])),
    }
    return _combined(positive, weights[0], negative, -weights[1]), metadata


def _combined(first: Parts, one: float, second: Parts, two: float) -> dict[str, Part]:
    """One * first + two * second; a matrix that only one of them has is zero in the other."""
    found: dict[str, Part] = {}
    for name in dict.fromkeys([*first, *second]):
        if name not in second:
            found[name] = _times(first[name], one)
        elif name not in first:
            found[name] = scaled_part(second[name], two)
        else:
            try:
                found[name] = added(_times(first[name], one), second[name], two)
            except InputError as error:
                raise InputError(f"the two deltas are of different models: of {name} {error}") from error
    return found


def _times(part: Part, factor: float) -> Part:
    return part if factor == 1.0 else scaled_part(part, factor)


def sides_of(positive: Parts, negative: Parts) -> dict[str, float | None]:
    """How alike two deltas are, over all matrices together, each a vector of all its elements.

    With d = positive - negative and the mean m = (positive + negative) / 2: `cosine` of the two, `norm_ratio`
    ||positive|| / ||negative||, `norm` ||d||, `drift_ratio` ||m|| / ||d / 2||: what both have in common over half of
    what they differ in, and `drift_cosine` |cos(d, m)|. None where a side is zero.
    """
    plus = sum(frobenius(part) ** 2 for part in positive.values())
    minus = sum(frobenius(part) ** 2 for part in negative.values())
    both = positive.keys() & negative.keys()
    if wrong := sorted(name for name in both if tuple(positive[name].shape) != tuple(negative[name].shape)):
        name = wrong[0]
        raise InputError(
            f"the two deltas are of different models: {name} is {list(positive[name].shape)} in one and "
            f"{list(negative[name].shape)} (d_out, d_in) in the other"
        )
    cross = sum(inner(positive[name], negative[name]) for name in both)
    apart, shared = max(0.0, plus + minus - 2 * cross), max(0.0, plus + minus + 2 * cross)
    return {
        "cosine": _ratio(cross, math.sqrt(plus * minus)),
        "norm_ratio": _ratio(math.sqrt(plus), math.sqrt(minus)),
        "norm": math.sqrt(apart),
        "positive_norm": math.sqrt(plus),
        "negative_norm": math.sqrt(minus),
        "drift_ratio": _ratio(math.sqrt(shared), math.sqrt(apart)),
        "drift_cosine": _ratio(abs(plus - minus), math.sqrt(apart * shared)),
    }


def _ratio(value: float, over: float) -> float | None:
    return value / over if over > 0.0 else None


def _bisector(sides: Mapping[str, float | None]) -> tuple[float, float]:
    """Weights that give both sides unit length and their difference the length it had."""
    plus, minus, cosine, norm = (sides[key] for key in ("positive_norm", "negative_norm", "cosine", "norm"))
    if not plus or not minus or cosine is None or cosine >= 1.0:
        raise InputError(
            "mode='bisector' gives both sides the same length: one of them is zero, or they point the same way"
        )
    length = (norm or 0.0) / math.sqrt(2.0 - 2.0 * cosine)
    return length / plus, length / minus


def _common_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    one, two = first.get("base") or {}, second.get("base") or {}
    digests, others = one.get("digests", {}), two.get("digests", {})
    differing = sorted(name for name in digests.keys() & others.keys() if digests[name] != others[name])
    if differing:
        name = differing[0]
        raise InputError(
            f"the two deltas were made for different weights: {name} had the digest {digests[name][:16]} for one and "
            f"{others[name][:16]} for the other"
        )
    return {"name": one.get("name") or two.get("name"), "digests": {**others, **digests}}
