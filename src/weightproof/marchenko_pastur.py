"""Marchenko-Pastur fit of the bulk of a weight matrix, and the spikes above it.

Spikes (singular values above the bulk edge plus the Tracy-Widom allowance) are learned structure.
How many there are depends on the null, the model of the noise:

    biwhitened   rows and columns rescaled to unit variance first; the default
    global       one noise scale for all entries; rows of unequal size become false spikes
    signflip     the edge is that of the same entries with random signs; conservative

A `BulkFit` carries the singular values it was made on: compare spikes only under one null.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from weightproof.errors import InputError
from weightproof.numerics.gram import NUMERICAL_ZERO, exact_singular_values
from weightproof.numerics.matrices import as_matrix, check_finite, full_precision, max_abs, seeded_generator
from weightproof.numerics.random_matrix import (
    bulk_edges,
    median_scale_error,
    mp_cdf,
    mp_density,
    mp_median,
    observed_spike,
    spike_alignment,
    tracy_widom_statistic,
    tracy_widom_threshold,
    true_spike,
    visible_threshold,
)
from weightproof.numerics.whitening import SINKHORN_PASSES, biwhiten, live_shape
from weightproof.types import BulkFit

__all__ = [
    "NULLS",
    "bound_num_spikes",
    "bulk_edges",
    "fit_bulk",
    "growth_ratio",
    "is_pure_bulk",
    "median_scale_error",
    "mp_cdf",
    "mp_density",
    "mp_median",
    "observed_spike",
    "spike_alignment",
    "tracy_widom_statistic",
    "tracy_widom_threshold",
    "true_spike",
    "visible_threshold",
]

NULLS = ("biwhitened", "global", "signflip")

SPIKE_LEVEL = 0.999
TRIM_LEVEL = 0.99
TRIM_ROUNDS = 50

# Standard deviations of the estimated noise scale by which the threshold is raised.
SCALE_MARGIN = 2.0

# A spectrum without spikes is pure bulk within this Kolmogorov-Smirnov distance, or within 6 / k: over 1000 Gaussian
# matrices of ten shapes from 32 x 32 to 512 x 512 the distance times k never passed 5.2, under either null.
PURE_BULK_DISTANCE = 0.02
PURE_BULK_DISTANCE_TIMES_K = 6.0


@dataclass(frozen=True, slots=True)
class _Law:
    """The noise law fitted to one spectrum, for the `shape` without zero rows and columns.

    `quantiles` are the ascending singular values of a sampled law (signflip); else the law is
    Marchenko-Pastur at `sigma`.
    """

    shape: tuple[int, int]
    sigma: float
    edges: tuple[float, float]
    threshold: float
    method: str
    quantiles: np.ndarray | None = None

    def cdf(self, singular_values: np.ndarray) -> np.ndarray:
        """Share of the noise below each of `singular_values`."""
        if self.quantiles is not None:
            return np.searchsorted(self.quantiles, singular_values, side="right") / len(self.quantiles)
        short, long = sorted(self.shape)
        return mp_cdf((singular_values / self.sigma) ** 2 / long, short / long)


@full_precision
def fit_bulk(matrix: torch.Tensor | np.ndarray, null: str = "biwhitened", *, name: str = "") -> BulkFit:
    """Fit the noise bulk of a matrix and count the singular values above it.

    sigma_mp is the median singular value over sqrt(N mp_median(b)): of the whitened matrix, with
    outliers trimmed until their number settles (biwhitened); of the matrix (global; trimming
    unwhitened weights would double the false spikes); of the sign-flipped matrix (signflip).
    The threshold is the 99.9 % Tracy-Widom quantile at sigma_mp, raised by 2 standard deviations
    of sigma_mp. Zero rows and columns are left out of the shape.

    Args:
        matrix: (d_out, d_in), any floating point dtype; never modified.
        null: "biwhitened", "global" or "signflip". The edge of "signflip" is one random draw:
            it is reproducible, and under permutation of rows or columns it moves by at most
            about the Tracy-Widom spread, (threshold - edge_plus) / edge_plus.
        name: Used in errors and in the result.

    Raises:
        InputError: unknown null, not a 2-D floating point matrix, or NaN or inf in it.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> fit_bulk(rng.standard_normal((64, 256)), null="global").num_spikes
        0
    """
    if null not in NULLS:
        raise InputError(f"the null is {null!r}; give one of {', '.join(NULLS)}.")
    matrix = as_matrix(matrix, name)
    magnitude = max_abs(matrix)
    check_finite(magnitude, name)
    if magnitude == 0.0:
        law = _Law((matrix.shape[0], matrix.shape[1]), 0.0, (0.0, 0.0), 0.0, "zero-matrix")
        return _describe(matrix, torch.zeros(min(matrix.shape), dtype=torch.float64), law, null=null, name=name)
    if magnitude < torch.finfo(torch.float32).tiny * 2**10:
        # So near the subnormal numbers the reciprocals that whitening needs overflow in float32.
        matrix = matrix.double()
    if null == "biwhitened":
        whitening = biwhiten(matrix, magnitude=magnitude, name=name)
        shape, scales = whitening.live_shape, (whitening.row_scale, whitening.col_scale)
    else:
        shape, scales = live_shape(matrix), (None, None)
    values, dtype = exact_singular_values(matrix, name=name, row_scale=scales[0], col_scale=scales[1])
    method = f"gram-eigh-{str(dtype).removeprefix('torch.')}"
    law = _signflip_law(matrix, shape, method) if null == "signflip" else _median_law(values, shape, null, method)
    fit = _describe(matrix, values, law, null=null, name=name)
    return replace(fit, row_scale=scales[0], col_scale=scales[1])


def median_scale(singular_values: torch.Tensor, shape: tuple[int, int]) -> float:
    """Noise scale from the median singular value: median / sqrt(N mp_median(b))."""
    short, long = sorted(shape)
    return float(np.median(singular_values.numpy())) / math.sqrt(long * mp_median(short / long))


def trimmed_scale(singular_values: torch.Tensor, shape: tuple[int, int]) -> float:
    """Noise scale from the median of what lies below the 99 % Tracy-Widom threshold.

    Repeated until the number of values above the threshold settles. At most half are trimmed.
    """
    short = min(shape)
    scale, spikes = median_scale(singular_values, shape), 0
    for _ in range(TRIM_ROUNDS):
        found = min(int((singular_values > tracy_widom_threshold(*shape, scale, TRIM_LEVEL)).sum()), short // 2)
        if found == spikes:
            break
        spikes = found
        scale = median_scale(singular_values[spikes:], shape)
    return scale


def _median_law(values: torch.Tensor, shape: tuple[int, int], null: str, method: str) -> _Law:
    """The law at the noise scale of the median; no noise at all for an exactly low-rank matrix."""
    live = values[: min(shape)]
    floor = NUMERICAL_ZERO * float(live[0])
    if float(live[len(live) // 2]) <= floor:
        return _Law(shape, 0.0, (0.0, 0.0), floor, f"{method}+low-rank")
    if null == "biwhitened":
        sigma, method = trimmed_scale(live, shape), f"{method}+sinkhorn-{SINKHORN_PASSES}+median-trim"
    else:
        sigma, method = median_scale(live, shape), f"{method}+median"
    margin = 1.0 + SCALE_MARGIN * median_scale_error(*shape)
    threshold = tracy_widom_threshold(*shape, sigma, SPIKE_LEVEL) * margin
    return _Law(shape, sigma, bulk_edges(*shape, sigma), threshold, method)


def _signflip_law(matrix: torch.Tensor, shape: tuple[int, int], method: str) -> _Law:
    """The spectrum of the matrix with random signs (Hong, Sheng and Dobriban 2020).

    The signs are drawn for the tall orientation, so that a transposed matrix has the same edge.
    The threshold is above the edge by what lies between the median and the 99.9 % quantile of
    Tracy-Widom, relative to the edge.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    generator = seeded_generator("signflip", *tall.shape)
    signs = torch.randint(0, 2, tall.shape, generator=generator, dtype=torch.int8, device="cpu")
    values, _ = exact_singular_values(tall * signs.mul_(2).sub_(1).to(device=tall.device))
    live = values[: min(shape)]
    sigma, high = median_scale(live, shape), float(live[0])
    middle, far = (tracy_widom_threshold(*shape, level=level) for level in (0.5, SPIKE_LEVEL))
    threshold = high * (1.0 + (far - middle) / bulk_edges(*shape)[1])
    edges = (float(live[-1]), high)
    return _Law(shape, sigma, edges, threshold, f"{method}+signflip", live.flip(0).numpy())


def _describe(matrix: torch.Tensor, values: torch.Tensor, law: _Law, *, null: str, name: str) -> BulkFit:
    """Spikes and distance of the descending `values` under `law`."""
    spikes = int((values > law.threshold).sum())
    energy = values.square()
    total = float(energy.sum())
    return BulkFit(
        name=name,
        d_out=matrix.shape[0],
        d_in=matrix.shape[1],
        sigma_mp=law.sigma,
        aspect_ratio=min(law.shape) / max(law.shape),
        edge_minus=law.edges[0],
        edge_plus=law.edges[1],
        threshold=law.threshold,
        num_spikes=spikes,
        spike_energy=float(energy[:spikes].sum()) / total if total else 0.0,
        ks_distance=_bulk_distance(values[spikes : min(law.shape)], law),
        null=null,
        method=law.method,
        singular_values=values,
    )


def _bulk_distance(bulk: torch.Tensor, law: _Law) -> float:
    """Kolmogorov-Smirnov distance of the values below the threshold to the law; 0 without noise."""
    count = len(bulk)
    if law.sigma == 0.0 or count == 0:
        return 0.0
    expected = law.cdf(bulk.flip(0).numpy())
    steps = np.arange(count + 1) / count
    return float(max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))


def bound_num_spikes(fit: BulkFit, delta_norm: float) -> tuple[int, int]:
    """Fewest and most values above `fit.threshold` after a change of spectral norm <= `delta_norm`.

    Weyl: no singular value moves by more than the norm of the change.

    Args:
        fit: The fit before the change.
        delta_norm: In the units of `fit.singular_values`; for a biwhitened fit that is the norm of
            the change multiplied by `row_scale` and `col_scale` (see `delta_norm_bound`).

    Raises:
        InputError: `delta_norm` is negative or NaN.
    """
    if not delta_norm >= 0.0:
        raise InputError(f"the norm of the change to {fit.name!r} is {delta_norm}; give a number >= 0.")
    low, high = (int((fit.singular_values > fit.threshold + shift).sum()) for shift in (delta_norm, -delta_norm))
    return low, high


def growth_ratio(now: BulkFit, base: BulkFit) -> float | None:
    """(s_1 / edge_plus now) / (s_1 / edge_plus before); plain s_1 ratio when both edges are 0.

    None when it is undefined: a zero matrix before, or an edge that is zero on one side only.

    Raises:
        InputError: the two fits are of different nulls.
    """
    if now.null != base.null:
        raise InputError(f"{now.name!r} was fitted with the nulls {base.null!r} and {now.null!r}; use one.")
    top_now, top_base = float(now.singular_values[0]), float(base.singular_values[0])
    if top_base == 0.0 or (now.edge_plus == 0.0) != (base.edge_plus == 0.0):
        return None
    if now.edge_plus == 0.0:
        return top_now / top_base
    return (top_now / now.edge_plus) / (top_base / base.edge_plus)


def is_pure_bulk(fit: BulkFit) -> bool:
    """Whether the spectrum is noise and nothing else: no spike, and the bulk follows the law.

    True for a zero matrix. A model whose matrices are all pure bulk looks untrained.
    """
    distance = max(PURE_BULK_DISTANCE, PURE_BULK_DISTANCE_TIMES_K / len(fit.singular_values))
    return fit.num_spikes == 0 and fit.ks_distance <= distance
