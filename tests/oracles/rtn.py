"""Slow, obvious float64 round-to-nearest quantization, one element at a time."""

from __future__ import annotations

import numpy as np


def groups(shape: tuple[int, int], granularity: str, group_size: int | None) -> list[tuple[slice, slice]]:
    """The index ranges that share one scale."""
    rows, cols = shape
    if granularity == "tensor":
        return [(slice(0, rows), slice(0, cols))]
    width = cols if granularity == "channel" else group_size
    return [(slice(r, r + 1), slice(c, min(c + width, cols))) for r in range(rows) for c in range(0, cols, width)]


def round_to_nearest(
    weight: np.ndarray, bits: int, granularity: str, group_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the quantized matrix and the step that each element was rounded with."""
    top = 2 ** (bits - 1) - 1
    result, steps = np.zeros(weight.shape), np.zeros(weight.shape)
    for where in groups(weight.shape, granularity, group_size):
        block = weight[where].astype(np.float64)
        step = max(abs(value) for value in block.ravel()) / top
        steps[where] = step
        if step > 0:
            result[where] = [[step * round(value / step) for value in row] for row in block]
    return result, steps


def count_levels(weight: np.ndarray, granularity: str, group_size: int | None) -> int:
    """Largest number of distinct values in one group."""
    found = (len({float(value) for value in weight[g].ravel()}) for g in groups(weight.shape, granularity, group_size))
    return max(found)
