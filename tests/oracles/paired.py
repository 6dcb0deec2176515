"""Slow, obvious paired statistics in float64, one number at a time."""

from __future__ import annotations

import math
import random

import numpy as np
from scipy import stats


def ratio(before: list[float], after: list[float], weight: list[float]) -> float:
    """(sum after - sum before) / sum weight."""
    return (math.fsum(after) - math.fsum(before)) / math.fsum(weight)


def bootstrap_ratios(before, after, weight, replicates: int, seed: int) -> list[float]:
    """Ratios of groups drawn with replacement."""
    rng, groups = random.Random(seed), list(zip(before, after, weight, strict=True))
    draws = (rng.choices(groups, k=len(groups)) for _ in range(replicates))
    return [ratio(*map(list, zip(*drawn, strict=True))) for drawn in draws]


def bca(before, after, weight, draws: list[float], tail: float) -> tuple[float, float]:
    """Efron's interval (1987) at a nominal tail on each side."""
    estimate, n = ratio(before, after, weight), len(weight)
    below = sum((draw < estimate) + (draw == estimate) / 2 for draw in draws) / len(draws)
    left_out = [
        ratio(*([x for j, x in enumerate(array) if j != i] for array in (before, after, weight))) for i in range(n)
    ]
    mean = math.fsum(left_out) / n
    cubes = math.fsum((mean - value) ** 3 for value in left_out)
    squares = math.fsum((mean - value) ** 2 for value in left_out)
    acceleration = cubes / (6 * squares**1.5)
    bias = stats.norm.ppf(below)
    ends = []
    for z in (stats.norm.ppf(tail), stats.norm.ppf(1 - tail)):
        ends.append(float(np.quantile(draws, stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))))
    return ends[0], ends[1]


def t_statistic(before, after, weight, theta: float) -> float:
    """Student's t of after - before - theta * weight."""
    z = [a - b - theta * w for b, a, w in zip(before, after, weight, strict=True)]
    mean = math.fsum(z) / len(z)
    variance = math.fsum((x - mean) ** 2 for x in z) / (len(z) - 1)
    return mean / math.sqrt(variance / len(z))


def skewness(before, after, weight, theta: float) -> float:
    """Third standardised moment of the same z."""
    z = [a - b - theta * w for b, a, w in zip(before, after, weight, strict=True)]
    mean = math.fsum(z) / len(z)
    second, third = (math.fsum((x - mean) ** power for x in z) / len(z) for power in (2, 3))
    return third / second**1.5


def hall(t: float, skew: float, n: int) -> float:
    """Hall's transformation (1992) of a t statistic."""
    return t + skew * t**2 / (3 * math.sqrt(n)) + skew**2 * t**3 / (27 * n) + skew / (6 * math.sqrt(n))


def mixture_evidence(t: float, n: int, effect_variance: float) -> float:
    """Likelihood ratio of a sample with this t, effects N(0, g) mixed, against no effect, by double integration.

    The sample is the n numbers m + e with mean square deviation 1; the standard deviation has density 1 / s.
    """
    mean = t / math.sqrt(n - 1)
    logs, effects = np.linspace(-3.0, 3.0, 601)[:, None], np.linspace(-8.0, 8.0, 2001)[None, :]
    scale = np.exp(logs)

    def log_likelihood(effect):
        return -n * logs - n * (1.0 + (mean - effect * scale) ** 2) / (2.0 * scale**2)

    prior = stats.norm.pdf(effects, scale=math.sqrt(effect_variance))
    top = float(log_likelihood(effects).max())
    mixed = np.trapezoid(np.trapezoid(np.exp(log_likelihood(effects) - top) * prior, effects, axis=1), logs[:, 0])
    return float(mixed / np.trapezoid(np.exp(log_likelihood(0.0) - top)[:, 0], logs[:, 0]))


def newcombe(both: int, lost: int, gained: int, neither: int, alpha: float) -> tuple[float, float]:
    """Method 10 of Newcombe (1998) for after - before, Wilson's ends as roots of their quadratic."""
    n, z = both + lost + gained + neither, stats.norm.isf(alpha / 2)

    def wilson(p: float) -> list[float]:
        return sorted(np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]).real)

    p, q = (both + gained) / n, (both + lost) / n
    (l1, u1), (l2, u2) = wilson(p), wilson(q)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    cross = both * neither - lost * gained
    corrected = cross - n / 2 if cross > n / 2 else 0 if cross >= 0 else cross
    phi = corrected / math.sqrt(margins) if margins else 0.0
    down = math.sqrt((p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2)
    up = math.sqrt((u1 - p) ** 2 - 2 * phi * (u1 - p) * (q - l2) + (q - l2) ** 2)
    return p - q - down, p - q + up
