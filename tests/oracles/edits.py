"""Slow, obvious float64 versions of the edits: loops, full sorts, full decompositions."""

from __future__ import annotations

import math

import numpy as np


def asymmetric(weight: np.ndarray, bits: int, groups: list[tuple[slice, slice]]) -> tuple[np.ndarray, np.ndarray]:
    """Rounding with a zero point, element by element, and the step of each element."""
    top = 2**bits - 1
    result, steps = np.zeros(weight.shape), np.zeros(weight.shape)
    for where in groups:
        block = weight[where].astype(np.float64)
        low, high = min(0.0, block.min()), max(0.0, block.max())
        step = (high - low) / top
        steps[where] = step
        if step > 0:
            zero = round(-low / step)
            levels = [step * (q - zero) for q in range(top + 1)]
            result[where] = [[min(levels, key=lambda level: abs(level - value)) for value in row] for row in block]
    return result, steps


def pruned(weights: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Sort all elements of all matrices by magnitude, ties in order, and drop the first share of them."""
    order = sorted(
        (abs(float(value)), number, place)
        for number, weight in enumerate(weights)
        for place, value in enumerate(weight.ravel())
        if not math.isnan(value)
    )
    total = sum(weight.size for weight in weights)
    results = [weight.astype(np.float64).ravel().copy() for weight in weights]
    for _, number, place in order[: math.floor(sparsity * total + 0.5)]:
        results[number][place] = 0.0
    return [result.reshape(weight.shape) for result, weight in zip(results, weights, strict=True)]


def pruned_groups(weight: np.ndarray, kept: int, of: int) -> np.ndarray:
    """Of every group of consecutive inputs, drop the smallest, the first of equal ones; NaN stays."""
    result = weight.astype(np.float64).copy()
    for row in result:
        for start in range(0, len(row), of):
            ranked = sorted(
                range(start, start + of), key=lambda i: (math.inf if math.isnan(row[i]) else abs(row[i]), i)
            )
            for place in ranked[: of - kept]:
                if not math.isnan(row[place]):
                    row[place] = 0.0
    return result


def truncated(weight: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank from a full decomposition."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def rank_for(weight: np.ndarray, energy: float) -> int:
    """Smallest rank that holds a share of the squared singular values."""
    squares = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
    rank = 0
    while squares.sum() > 0 and squares[:rank].sum() < energy * squares.sum():
        rank += 1
    return rank


def compensated(weight: np.ndarray, hessian: np.ndarray, nearest, damping: float, order: list[int]) -> np.ndarray:
    """Optimal brain surgeon, literally: round a weight, move the free ones by the constrained optimum, shrink H.

    `nearest(row, column, value)` is the level to which a value is rounded. The inverse of what is left of H is
    taken anew for every column.
    """
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    result = weight.astype(np.float64).copy()
    for number, column in enumerate(order):
        free = order[number:]
        inverse = np.linalg.inv(damped[np.ix_(free, free)])
        for row in range(len(result)):
            level = nearest(row, column, result[row, column])
            step = (result[row, column] - level) / inverse[0, 0]
            result[row, free] -= step * inverse[:, 0]
            result[row, column] = level
    return result
