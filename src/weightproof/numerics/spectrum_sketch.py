"""A spectrum before and after a change, small enough for a certificate: two histograms with their noise fits.

Singular values are given in units of the upper Marchenko-Pastur edge of their own fit, so that noise ends at
1 on both sides whatever the null and the scale were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from weightproof.errors import InputError
from weightproof.marchenko_pastur import fit_bulk
from weightproof.types import BulkFit, WeightMatrix

BINS = 48
MOST = 3
"""Matrices of one change that are drawn."""
BUDGET = 2e10
"""What spectra after the first may cost together, both sides times the smaller one: seconds, not minutes."""
LOG_FROM = 4.0
"""From this ratio of top singular value to edge on, bins are equally wide in the logarithm."""


def worst_changed(
    matrices: Iterable[WeightMatrix], deltas: Mapping[str, float | None], fits: Mapping[str, BulkFit]
) -> list[WeightMatrix]:
    """The most changed of the matrices that have a fit before, most changed first; few enough to be fitted again.

    Args:
        matrices: Those of the changed model.
        deltas: ||W' - W|| / ||W|| by name, None where W was zero.
        fits: Fits before the change, by name.
    """
    known = {name: delta for name, delta in deltas.items() if delta is not None and name in fits}
    worst = sorted(known, key=lambda name: (-known[name], name))[:MOST]
    found = {matrix.name: matrix for matrix in matrices if matrix.name in worst}
    chosen: list[WeightMatrix] = []
    spent = 0.0
    for name in worst:
        if name not in found:
            continue
        spent += spectrum_cost(found[name]) if chosen else 0.0
        if spent <= BUDGET:
            chosen.append(found[name])
    return chosen


def spectrum_cost(matrix: WeightMatrix) -> float:
    """Cost of an exact spectrum, in multiplications up to a factor."""
    return float(matrix.d_out * matrix.d_in * min(matrix.d_out, matrix.d_in))


def sketches_of(
    matrices: Iterable[WeightMatrix], deltas: Mapping[str, float | None], fits: Mapping[str, BulkFit]
) -> tuple[dict[str, Any], ...]:
    """Sketches of the most changed matrices, read one at a time; those that cannot be fitted are left out."""
    sketches: list[dict[str, Any]] = []
    for matrix in worst_changed(matrices, deltas, fits):
        with suppress(InputError):  # not finite, say: another guard tells of it
            after = fit_bulk(matrix.load(), name=matrix.name)
            sketches.append(sketch(matrix.name, matrix.family, fits[matrix.name], after))
    return tuple(sketches)


def sketch(name: str, family: str, before: BulkFit, after: BulkFit) -> dict[str, Any]:
    """Histograms of one matrix before and after, on common bins.

    Args:
        name: Public name of the matrix.
        family: Its family.
        before: Fit of the matrix in the baseline.
        after: Fit of the changed matrix.

    Returns:
        JSON types: `matrix`, `family`, `shape`, `null`, `scale` ("linear" or "log"), `low` and `high` (ends of
        the bins, in units of the edge), and for `before` and `after` the `counts` per bin, `sigma_mp`, `edge_plus`
        and `threshold` (in the units of the fitted spectrum), `num_spikes`, `spike_energy` and `top_over_edge`.
        About 1 KiB a matrix.
    """
    values = {"before": _ratios(before), "after": _ratios(after)}
    top = max([1.05, *(float(side.max()) for side in values.values() if len(side))])
    is_log = top >= LOG_FROM
    low = _floor(np.concatenate(list(values.values())), top) if is_log else 0.0
    high = top * (1.06 if is_log else 1.03)
    edges = np.geomspace(low, high, BINS + 1) if is_log else np.linspace(low, high, BINS + 1)
    sides = {word: _side(fit, values[word], edges) for word, fit in (("before", before), ("after", after))}
    return {
        "matrix": name,
        "family": family,
        "shape": [before.d_out, before.d_in],
        "null": before.null,
        "scale": "log" if is_log else "linear",
        "low": low,
        "high": high,
        **sides,
    }


def _side(fit: BulkFit, ratios: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    # What lies below the first bin (exact zeros, on a logarithmic axis) is counted in it.
    counts, _ = np.histogram(np.clip(ratios, edges[0], edges[-1]), bins=edges)
    return {
        "counts": [int(count) for count in counts],
        "sigma_mp": float(fit.sigma_mp),
        "edge_plus": float(fit.edge_plus),
        "threshold": float(fit.threshold),
        "num_spikes": int(fit.num_spikes),
        "spike_energy": float(fit.spike_energy),
        "top_over_edge": float(ratios.max()) if len(ratios) else None,
    }


def _ratios(fit: BulkFit) -> np.ndarray:
    """Finite singular values in units of the upper edge (of their maximum, where there is no edge)."""
    values = fit.singular_values.double().cpu().numpy()
    values = values[np.isfinite(values)]
    unit = fit.edge_plus
    if not (math.isfinite(unit) and unit > 0):
        unit = float(values.max()) if len(values) and values.max() > 0 else 1.0
    return values / unit


def _floor(ratios: np.ndarray, top: float) -> float:
    positive = ratios[ratios > 0]
    return max(float(np.quantile(positive, 0.01)) * 0.8 if len(positive) else 0.05, top * 1e-3)
