"""Pictures of a report as inline SVG: the loss interval, spectra, and bars of value against limit.

Horizontal positions are percentages and letters keep their size, so one picture serves a phone and a desk.
Colours are classes of the style sheet: the same picture is right in light, in dark and in print. Every SVG is an
image with a title and a description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from weightproof.numerics.random_matrix import mp_density
from weightproof.reporting.words import number, percent, plural

_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_WIDTH = 1000.0  # units of the stretched drawing area inside a picture
_PANEL = 92
"""Height of one histogram, in CSS pixels."""


def _svg(title: str, description: str, height: float, body: Markup, kind: str) -> Markup:
    return Markup(
        '<svg class="picture {}" role="img" width="100%" height="{}" aria-label="{}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(kind, _px(height), f"{title}. {description}", title, description, body)


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _line(x: float, top: float, bottom: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(
        kind, _px(x), _px(x), _px(top), _px(bottom)
    )


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect class="{}" x="{}%" y="{}" width="{}%" height="{}"/>').format(
        kind, _px(x), _px(y), _px(max(width, 0.0)), _px(height)
    )


def _text(x: float, y: float, words: str, kind: str, anchor: str | None = None) -> Markup:
    """Text that leans inwards where it would leave the picture."""
    if anchor is None:
        anchor = "start" if x < 26 else "end" if x > 74 else "middle"
    return Markup('<text class="{}" x="{}%" y="{}" text-anchor="{}">{}</text>').format(
        kind, _px(x), _px(y), anchor, words
    )


def _stretched(y: float, height: float, path: str, kind: str) -> Markup:
    """A path in a box of 1000 x 100 that takes the whole width."""
    return Markup(
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 1000 100" preserveAspectRatio="none">'
        '<path class="{}" d="{}"/></svg>'
    ).format(_px(y), _px(height), kind, path)


# -- value against limit ---------------------------------------------------------------------------


def meter(value: Any, limit: Any, outcome: str) -> Markup:
    """A bar of |value| / |limit| on a logarithmic scale, the limit at the middle; empty without a limit.

    The bar is empty at a hundredth of the limit and full at a hundred times of it.
    """
    share = share_of_limit(value, limit)
    if share is None:
        return Markup("")
    words = f"{percent(share)} of the limit" if math.isfinite(share) else "beyond every limit"
    body = Markup("").join(
        [
            _rect(0, 4, 100, 6, "track"),
            _rect(0, 4, _on_scale(share), 6, f"fill {outcome.lower()}"),
            _line(50, 0, 14, "mark"),
        ]
    )
    return Markup(
        '<svg class="meter" role="img" width="100%" height="14" aria-label="{}"><title>{}</title>{}</svg>'
    ).format(words, words, body)


def _on_scale(share: float) -> float:
    if share <= 0:
        return 0.0
    return 100.0 if not math.isfinite(share) else min(max(50 + 25 * math.log10(share), 1.0), 100.0)


def share_of_limit(value: Any, limit: Any) -> float | None:
    """|value| / |limit|; infinite for what is not finite, None where there is nothing to divide."""
    if value is None or not isinstance(limit, int | float) or not limit:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return math.inf
    return abs(value) / abs(limit)


# -- the loss against its limit --------------------------------------------------------------------


def loss_interval(reading: Mapping[str, Any], limit: float | None, outcome: str) -> Markup:
    """Interval of the change of a loss or metric, against no change and against the limit.

    Args:
        reading: A `LossReading` as the certificate carries it, with its interval.
        limit: Limit of the difference, in its units and with its sign; None draws the interval alone. Beyond it,
            on the side where the metric is worse, is rejected.
        outcome: Outcome of the guard: PASS, WARN (undecided) or FAIL.

    Returns:
        The picture; empty where there is no interval.
    """
    ends = [reading.get(key) for key in ("lower", "difference", "upper")]
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        return Markup("")
    lower, middle, upper = (float(end) for end in ends if end is not None)
    words = _change_words(reading)
    place = _placer([lower, upper, 0.0, *([] if limit is None else [limit])], limit)
    parts = _zones(place(limit), is_higher_better(reading)) if limit is not None else []
    parts += [
        _line(place(0.0), 40, 92, "zero"),
        _text(place(0.0), 122, "no change", "label faint"),
        _rect(place(lower), 62, place(upper) - place(lower), 8, f"interval {outcome.lower()}"),
        _line(place(lower), 56, 76, f"whisker {outcome.lower()}"),
        _line(place(upper), 56, 76, f"whisker {outcome.lower()}"),
        Markup('<circle class="point" cx="{}%" cy="66" r="5"/>').format(_px(place(middle))),
        _text(place(middle), 13, f"{words(middle)}  ({words(lower)} to {words(upper)})", "label strong"),
    ]
    if limit is not None:
        parts += [
            _line(place(limit), 40, 92, "limit"),
            _text(place(limit), 106, f"limit {words(limit)}", "label limit"),
        ]
    title = f"Change of the {metric_words(reading)} on the {reading.get('role', '')} data"
    told = f"{words(middle)}, interval from {words(lower)} to {words(upper)}"
    told += "" if limit is None else f"; the limit is {words(limit)}"
    return _svg(title, told + ".", 128, Markup("").join(parts), "loss")


def metric_words(reading: Mapping[str, Any]) -> str:
    """Name of the measured metric, in words."""
    metric = str(reading.get("metric", ""))
    return "perplexity" if metric == "nll" else metric


def _change_words(reading: Mapping[str, Any]) -> Callable[[float], str]:
    """How a difference is said: a change of perplexity in per cent for "nll", else the plain difference."""

    def words(value: float) -> str:
        shown = math.expm1(min(value, 50.0)) if reading.get("metric") == "nll" else None
        text = number(value) if shown is None else percent(shown, 3)
        return text if value < 0 else f"+{text}"

    return words


def _placer(values: Sequence[float], limit: float | None) -> Callable[[float], float]:
    """Value to per cent of the width; the limit keeps room on both sides for what is written there."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    low, high = low - 0.12 * span, high + 0.12 * span
    if limit is not None:
        low = min(low, (limit - 0.36 * high) / 0.64)
        high = max(high, low + (limit - low) / 0.70)
    return lambda value: 100 * (value - low) / (high - low)


def is_higher_better(reading: Mapping[str, Any]) -> bool:
    """Whether more of the metric is better, as of an accuracy."""
    return bool((reading.get("sums") or {}).get("higher_is_better"))


def _zones(at: float, higher_is_better: bool) -> list[Markup]:
    """Two tinted halves, on either side of the limit."""
    names = ("rejected", "accepted") if higher_is_better else ("accepted", "rejected")
    return [
        _rect(0, 40, at, 52, f"zone {names[0]}"),
        _rect(at, 40, 100 - at, 52, f"zone {names[1]}"),
        _text(at - 1, 33, names[0], f"label {names[0]}", "end"),
        _text(at + 1, 33, names[1], f"label {names[1]}", "start"),
    ]


# -- spectra ---------------------------------------------------------------------------------------


def spectrum(sketch: Mapping[str, Any]) -> Markup:
    """Two histograms of singular values, before above and after below, with noise fit and edge.

    Args:
        sketch: What `spectrum_sketch.sketch` made.
    """
    place, bins = _axis(sketch)
    top = 0.0
    parts: list[Markup] = []
    for word in ("before", "after"):
        parts += _panel(word, sketch, bins, place, top + 22)
        top += _PANEL + 30
    bottom = top - 8
    for tick in _ticks(sketch):
        at = place(tick)
        lean = "start" if at < 2 else "end" if at > 97 else "middle"
        parts += [_line(at, bottom, bottom + 4, "axis"), _text(at, bottom + 17, f"{tick:g}", "label faint", lean)]
    parts.append(_text(0, bottom + 34, "singular value / edge of the noise", "label faint", "start"))
    title = f"Singular values of {sketch['matrix']}"
    return _svg(title, spectrum_words(sketch), bottom + 38, Markup("").join(parts), "spectrum")


def spectrum_words(sketch: Mapping[str, Any]) -> str:
    """The picture in a sentence."""
    told = []
    for word in ("before", "after"):
        side = sketch[word]
        told.append(
            f"{word}: {plural(side['num_spikes'], 'singular value')} above the noise, "
            f"the largest {number(side['top_over_edge'])} times the edge"
        )
    return "; ".join(told) + "."


def _axis(sketch: Mapping[str, Any]) -> tuple[Callable[[float], float], np.ndarray]:
    low, high, count = float(sketch["low"]), float(sketch["high"]), len(sketch["before"]["counts"])
    if sketch["scale"] == "log":
        return (
            lambda x: 100 * math.log(max(x, low) / low) / math.log(high / low),
            np.geomspace(low, high, count + 1),
        )
    return lambda x: 100 * (x - low) / (high - low), np.linspace(low, high, count + 1)


def _ticks(sketch: Mapping[str, Any]) -> list[float]:
    low, high = float(sketch["low"]), float(sketch["high"])
    if sketch["scale"] == "log":
        inside = [tick for tick in _TICKS if low <= tick <= high]
        return inside if len(inside) <= 6 else [tick for tick in inside if f"{tick:g}".strip("0.") == "1"]
    step = next(step for step in (0.25, 0.5, 1.0, 2.0) if high / step <= 6)
    return [step * index for index in range(int(high / step) + 1)]


def _panel(
    word: str, sketch: Mapping[str, Any], bins: np.ndarray, place: Callable[[float], float], top: float
) -> list[Markup]:
    """One histogram: bulk and spikes, the Marchenko-Pastur curve over it, the edge, and a line of words."""
    side = sketch[word]
    counts = np.asarray(side["counts"], dtype=np.float64)
    curve_at, curve = _bulk_curve(sketch, side, bins)
    tallest = max(1.0, float(counts.max()), float(curve.max()) if len(curve) else 0.0)
    threshold = side["threshold"] / side["edge_plus"] if side["edge_plus"] > 0 else math.inf
    is_spike = np.sqrt(bins[1:] * np.maximum(bins[:-1], 1e-12)) > threshold
    ends = [10 * place(float(end)) for end in bins]
    edge = place(1.0)
    told = f"{plural(side['num_spikes'], 'spike')}, {percent(side['spike_energy'])} of the energy; "
    told += f"noise {number(side['sigma_mp'])}"
    points = " ".join(
        f"{10 * place(float(x)):.1f},{100 - 100 * y / tallest:.1f}" for x, y in zip(curve_at, curve, strict=True)
    )
    return [
        _stretched(top, _PANEL, _bars(ends, counts / tallest, ~is_spike), f"bulk {word}"),
        _stretched(top, _PANEL, _bars(ends, counts / tallest, is_spike), "spikes"),
        _stretched(top, _PANEL, f"M{points}" if points else "", "curve"),
        _line(edge, top - 2, top + _PANEL, "edge"),
        Markup('<line class="axis" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_px(top + _PANEL)),
        Markup(
            '<text class="label" x="0" y="{}"><tspan class="strong">{}</tspan>'
            '<tspan class="faint" dx="8">{}</tspan></text>'
        ).format(_px(top - 8), word, told),
    ]


def _bars(ends: Sequence[float], heights: np.ndarray, chosen: np.ndarray) -> str:
    """One path for all chosen bars, with a hair between neighbours."""
    return "".join(
        f"M{ends[i] + 0.8:.1f} 100V{100 - 100 * heights[i]:.1f}H{ends[i + 1] - 0.8:.1f}V100Z"
        for i in range(len(heights))
        if chosen[i] and heights[i] > 0
    )


def _bulk_curve(sketch: Mapping[str, Any], side: Mapping[str, Any], bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts per bin of pure noise with the fitted scale, over the support of the bulk."""
    rows, columns = sketch["shape"]
    unit, ratio = float(side["edge_plus"]), min(rows, columns) / max(rows, columns)
    scale = max(rows, columns) * float(side["sigma_mp"]) ** 2
    if not (unit > 0 and scale > 0 and math.isfinite(unit) and math.isfinite(scale)):
        return np.zeros(0), np.zeros(0)
    lowest = max(float(bins[0]), 1e-3)
    at = np.geomspace(lowest, 1.0, 120) if sketch["scale"] == "log" else np.linspace(lowest, 1.0, 120)
    singular = at * unit
    density = mp_density(singular**2 / scale, ratio) * 2 * singular / scale * unit
    in_bulk = sum(side["counts"]) - side["num_spikes"]
    width = np.interp(at, 0.5 * (bins[1:] + bins[:-1]), np.diff(bins))
    return at, density * width * max(in_bulk, 0)
