"""Slow, obvious float64 versions of `weightproof.spectrum`."""

import numpy as np


def to_float64(matrix) -> np.ndarray:
    return matrix.astype(np.float64) if isinstance(matrix, np.ndarray) else matrix.detach().double().numpy()


def singular_values(matrix) -> np.ndarray:
    return np.linalg.svd(to_float64(matrix), compute_uv=False)


def spectral_norm(matrix) -> float:
    return float(singular_values(matrix)[0])


def stable_rank(matrix) -> float:
    values = singular_values(matrix)
    return float((values**2).sum() / values[0] ** 2) if values[0] else 0.0


def effective_rank(values: np.ndarray) -> float:
    share = values**2 / (values**2).sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def power_law_alpha(eigenvalues: np.ndarray) -> tuple[float, float, float, int]:
    """Full scan of xmin: (alpha, xmin, Kolmogorov-Smirnov distance, size of the tail)."""
    ordered = np.sort(eigenvalues)
    best = (np.inf, 0.0, 0.0, 0)
    for start in range(len(ordered) - 1):
        tail = ordered[start:]
        total = np.log(tail / tail[0]).sum()
        if total <= 0:
            continue
        exponent = len(tail) / total
        law = 1 - (tail / tail[0]) ** -exponent
        steps = np.arange(len(tail) + 1) / len(tail)
        distance = max(np.abs(law - steps[:-1]).max(), np.abs(law - steps[1:]).max())
        best = min(best, (distance, 1 + exponent, tail[0], len(tail)))
    return best[1], best[2], best[0], best[3]


def norm_collapse(matrix) -> float:
    squares = to_float64(matrix) ** 2
    ratios = []
    for axis in (0, 1):
        norms = np.sqrt(squares.sum(axis))
        ratios.append(norms.min() / np.median(norms) if np.median(norms) else 0.0)
    return float(min(ratios))
