"""The law of large noise matrices: Marchenko-Pastur bulk, Tracy-Widom edge, visibility of spikes.

Convention: W is d_out x d_in with independent entries of mean 0 and standard deviation sigma;
N = max(d_out, d_in), M = min(d_out, d_in), aspect ratio b = M / N <= 1. Singular values of noise
fill [sigma (sqrt N - sqrt M), sigma (sqrt N + sqrt M)]; x = s^2 / (N sigma^2) follows the
Marchenko-Pastur law on [(1 - sqrt b)^2, (1 + sqrt b)^2].
"""

from __future__ import annotations

import functools
import math

import numpy as np

from weightproof.errors import InputError

# Quantiles of the Tracy-Widom law of order 1, from its Fredholm determinant (Ferrari and Spohn 2005).
TRACY_WIDOM_QUANTILES = {
    0.5: -1.26857,
    0.9: 0.45014,
    0.95: 0.97932,
    0.99: 2.02345,
    0.995: 2.42233,
    0.999: 3.27220,
}


def bulk_edges(d_out: int, d_in: int, sigma: float = 1.0) -> tuple[float, float]:
    """Lower and upper edge of the singular values of noise: sigma |sqrt d_out -+ sqrt d_in|."""
    roots = math.sqrt(d_out), math.sqrt(d_in)
    return sigma * abs(roots[0] - roots[1]), sigma * (roots[0] + roots[1])


def _support(aspect_ratio: float) -> tuple[float, float]:
    if not 0.0 < aspect_ratio <= 1.0:
        raise InputError(f"the aspect ratio min(d_out, d_in) / max(d_out, d_in) is {aspect_ratio}; give one in (0, 1].")
    root = math.sqrt(aspect_ratio)
    return (1.0 - root) ** 2, (1.0 + root) ** 2


def mp_density(x: np.ndarray | float, aspect_ratio: float) -> np.ndarray:
    """sqrt((b+ - x)(x - b-)) / (2 pi b x) on the support, 0 elsewhere; x = s^2 / (N sigma^2)."""
    low, high = _support(aspect_ratio)
    point = np.atleast_1d(np.asarray(x, dtype=np.float64))
    inside = (point > low) & (point < high)
    density = np.zeros_like(point)
    kept = point[inside]
    density[inside] = np.sqrt((high - kept) * (kept - low)) / (2.0 * math.pi * aspect_ratio * kept)
    return density


def mp_cdf(x: np.ndarray | float, aspect_ratio: float) -> np.ndarray:
    """Distribution function of the Marchenko-Pastur law, in closed form; x = s^2 / (N sigma^2).

    With R = sqrt((b+ - x)(x - b-)) it is 1/2 + [R + (1 + b) phi - (1 - b) psi] / (2 pi b), where
    phi and psi are the usual arcsines, written as arctangents to keep their accuracy at the edges.
    """
    low, high = _support(aspect_ratio)
    point = np.clip(np.atleast_1d(np.asarray(x, dtype=np.float64)), low, high)
    mean, root = 1.0 + aspect_ratio, 1.0 - aspect_ratio
    half_circle = np.sqrt(np.clip((high - point) * (point - low), 0.0, None))
    phi = np.arctan2(point - mean, half_circle)
    psi = np.arctan2(mean * point - root * root, root * half_circle)
    total = half_circle + mean * phi - root * psi
    return np.clip(0.5 + total / (2.0 * math.pi * aspect_ratio), 0.0, 1.0)


@functools.lru_cache(maxsize=1024)
def mp_median(aspect_ratio: float) -> float:
    """Median mu_b of x = s^2 / (N sigma^2): sigma = median(s) / sqrt(N mu_b) for pure noise."""
    low, high = _support(aspect_ratio)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(mp_cdf(middle, aspect_ratio)[0]) < 0.5 else (low, middle)
    return 0.5 * (low + high)


def _tracy_widom_scale(d_out: int, d_in: int) -> tuple[float, float]:
    """Centre and scale of s_1^2 / sigma^2 (Ma 2012, second-order accurate)."""
    long, short = math.sqrt(max(d_out, d_in) - 0.5), math.sqrt(min(d_out, d_in) - 0.5)
    return (long + short) ** 2, (long + short) * (1.0 / long + 1.0 / short) ** (1.0 / 3.0)


def tracy_widom_threshold(d_out: int, d_in: int, sigma: float = 1.0, level: float = 0.999) -> float:
    """The singular value that the largest one of a noise matrix exceeds with probability 1 - level.

    Raises:
        InputError: `level` is not one of .5, .9, .95, .99, .995, .999.
    """
    if level not in TRACY_WIDOM_QUANTILES:
        known = ", ".join(f"{value:g}" for value in TRACY_WIDOM_QUANTILES)
        raise InputError(f"no Tracy-Widom quantile is tabulated for the level {level}; give one of {known}.")
    centre, scale = _tracy_widom_scale(d_out, d_in)
    return sigma * math.sqrt(max(centre + TRACY_WIDOM_QUANTILES[level] * scale, 0.0))


def tracy_widom_statistic(spectral_norm: float, d_out: int, d_in: int, sigma: float = 1.0) -> float:
    """(s_1^2 / sigma^2 - centre) / scale, which follows the Tracy-Widom law for a noise matrix."""
    centre, scale = _tracy_widom_scale(d_out, d_in)
    return ((spectral_norm / sigma) ** 2 - centre) / scale


def median_scale_error(d_out: int, d_in: int) -> float:
    """Relative standard deviation of sigma estimated from the median singular value.

    The number of eigenvalues below a point in the bulk fluctuates by sqrt(ln M) / pi (Gaussian
    orthogonal class); divided by M times the density at the median and by 2 median.
    """
    short = min(d_out, d_in)
    aspect = short / max(d_out, d_in)
    median = mp_median(aspect)
    density = float(mp_density(median, aspect)[0])
    return math.sqrt(math.log(max(short, 2))) / (math.pi * short * density * 2.0 * median)


def visible_threshold(d_out: int, d_in: int, sigma: float = 1.0) -> float:
    """The strength sigma (d_out d_in)^(1/4) below which a spike theta u v' leaves no trace in the values.

    Baik, Ben Arous and Peche 2005; Benaych-Georges and Nadakuditi 2012.
    """
    return sigma * (d_out * d_in) ** 0.25


def observed_spike(theta: float, d_out: int, d_in: int, sigma: float = 1.0) -> float:
    """Where noise plus theta u v' has its top singular value: the upper edge unless visible."""
    if theta <= visible_threshold(d_out, d_in, sigma):
        return bulk_edges(d_out, d_in, sigma)[1]
    return math.sqrt((theta**2 + sigma**2 * d_out) * (theta**2 + sigma**2 * d_in)) / theta


def true_spike(observed: float, d_out: int, d_in: int, sigma: float = 1.0) -> float | None:
    """The theta that `observed_spike` maps to `observed`; None at or below the upper edge."""
    if observed <= bulk_edges(d_out, d_in, sigma)[1]:
        return None
    if sigma == 0.0:
        return observed
    excess = (observed / sigma) ** 2 - d_out - d_in
    return sigma * math.sqrt((excess + math.sqrt(excess**2 - 4.0 * d_out * d_in)) / 2.0)


def spike_alignment(theta: float, d_out: int, d_in: int, sigma: float = 1.0) -> tuple[float, float]:
    """Squared cosines between true and observed (left, right) vectors of a spike; 0 unless visible."""
    if theta <= visible_threshold(d_out, d_in, sigma):
        return 0.0, 0.0
    if sigma == 0.0:
        return 1.0, 1.0
    square = (theta / sigma) ** 2
    excess = square**2 - d_out * d_in
    return excess / (square * (square + d_out)), excess / (square * (square + d_in))
