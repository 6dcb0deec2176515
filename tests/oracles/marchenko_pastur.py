"""Slow, obvious float64 versions of `weightproof.marchenko_pastur`."""

import math

import numpy as np
from scipy import integrate, optimize


def density(x: float, b: float) -> float:
    low, high = (1 - math.sqrt(b)) ** 2, (1 + math.sqrt(b)) ** 2
    return math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * b * x) if low < x < high else 0.0


def cdf(x: float, b: float) -> float:
    low, high = (1 - math.sqrt(b)) ** 2, (1 + math.sqrt(b)) ** 2
    # x = centre - radius cos(t) removes the square-root ends.
    centre, radius = (low + high) / 2, (high - low) / 2
    angle = math.acos(max(-1.0, min(1.0, (centre - x) / radius)))

    def integrand(t: float) -> float:
        below = 2 * math.sin(t / 2) ** 2  # 1 - cos(t)
        return radius**2 * below * (2 - below) / (2 * math.pi * b * (low + radius * below))

    return integrate.quad(integrand, 0.0, angle, epsabs=1e-12, epsrel=1e-12, limit=200)[0]


def median(b: float) -> float:
    return optimize.brentq(lambda x: cdf(x, b) - 0.5, (1 - math.sqrt(b)) ** 2, (1 + math.sqrt(b)) ** 2, xtol=1e-12)


def biwhiten(matrix: np.ndarray, passes: int) -> np.ndarray:
    """Alternate row and column normalisation of the squares; ends on columns."""
    whitened = matrix.astype(np.float64)
    for _ in range(passes):
        whitened = whitened / np.sqrt((whitened**2).mean(1, keepdims=True))
        whitened = whitened / np.sqrt((whitened**2).mean(0, keepdims=True))
    return whitened


def spike_threshold(sigma: float, m: int, n: int, quantile: float) -> float:
    long, short = math.sqrt(max(m, n) - 0.5), math.sqrt(min(m, n) - 0.5)
    scale = (long + short) * (1 / long + 1 / short) ** (1 / 3)
    return sigma * math.sqrt((long + short) ** 2 + quantile * scale)


def trimmed_scale(values: np.ndarray, m: int, n: int) -> float:
    mu = median(min(m, n) / max(m, n))
    removed = -1
    kept = values
    while True:
        sigma = float(np.median(kept)) / math.sqrt(max(m, n) * mu)
        above = int((values > spike_threshold(sigma, m, n, 2.02345)).sum())
        if above == removed or (removed == -1 and above == 0):
            return sigma
        removed = above
        kept = values[removed:]


def ks_distance(values: np.ndarray, sigma: float, m: int, n: int) -> float:
    x = np.sort(values**2) / (max(m, n) * sigma**2)
    law = np.array([cdf(point, min(m, n) / max(m, n)) for point in x])
    steps = np.arange(len(x) + 1) / len(x)
    return float(max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max()))
