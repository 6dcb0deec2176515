"""The multiple-choice knapsack by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Item = Sequence[tuple[int, float]]


def totals(items: Sequence[Item]) -> Iterator[tuple[int, float, tuple[int, ...]]]:
    """(size, loss, choice) of every choice of one option for each item; losses are added in the items' order."""
    for choice in itertools.product(*(range(len(item)) for item in items)):
        loss = 0.0
        for item, index in zip(items, choice, strict=True):
            loss += item[index][1]
        yield sum(item[index][0] for item, index in zip(items, choice, strict=True)), loss, choice


def smallest_within(items: Sequence[Item], budget: float) -> int | None:
    """Least size of a choice whose loss is at most `budget`."""
    return min((size for size, loss, _ in totals(items) if loss <= budget), default=None)


def least_at_most(items: Sequence[Item], size: int) -> float:
    """Least loss of a choice that is not larger than `size`; inf if there is none."""
    return min((loss for total, loss, _ in totals(items) if total <= size), default=math.inf)
