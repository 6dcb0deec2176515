"""The multiple-choice knapsack: one option for each item, so that the size is smallest within a budget of losses.

Items are added one by one, and of all their combinations only those are kept that no other beats in both size and
loss (Nemhauser and Ullmann, 1969). What is left at the end is the frontier: for any budget the smallest choice
within it, and for any size the best that fits. It does not depend on the budget, so a larger budget never gives a
larger choice. Sizes of weight matrices share large divisors, which keeps the frontier of hundreds of matrices short;
where it grows beyond what is affordable it is thinned evenly by size, and is then close to the optimum, not at it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Combinations kept over all items together; nine bytes each.
MOST_CELLS = 1 << 24


@dataclass(frozen=True, eq=False)
class Frontier:
    """Choices that no other beats in both size and loss, smallest first.

    Attributes:
        sizes: Total size of each, increasing.
        losses: Total loss of each, strictly decreasing.
        is_exact: Whether nothing was thinned out.
    """

    sizes: np.ndarray
    losses: np.ndarray
    is_exact: bool
    _options: tuple[np.ndarray, ...]
    _parents: tuple[np.ndarray, ...]

    def within(self, budget: float) -> tuple[int, ...] | None:
        """The smallest choice whose loss is at most `budget`: an option for each item; None if there is none."""
        fitting = np.flatnonzero(self.losses <= budget)
        return self._choice(int(fitting[0])) if len(fitting) else None

    def at_most(self, size: int) -> tuple[int, ...] | None:
        """The choice with the least loss whose size is at most `size`; None if even the smallest is larger."""
        count = int(np.searchsorted(self.sizes, size, side="right"))
        return self._choice(count - 1) if count else None

    def least(self) -> tuple[int, ...]:
        """The choice with the least loss of all."""
        return self._choice(len(self.sizes) - 1)

    def _choice(self, index: int) -> tuple[int, ...]:
        chosen: list[int] = []
        for options, parents in zip(reversed(self._options), reversed(self._parents), strict=True):
            chosen.append(int(options[index]))
            index = int(parents[index])
        return tuple(reversed(chosen))


def frontier(items: Sequence[Sequence[tuple[int, float]]], *, most_cells: int = MOST_CELLS) -> Frontier:
    """The frontier of all choices of one option for each item.

    Args:
        items: For each item its options as (size, loss); a loss that is NaN counts as infinite.
        most_cells: Combinations to keep over all items together.

    Raises:
        ValueError: An item has no option.

    Example:
        >>> found = frontier([[(1, 5.0), (3, 1.0)], [(1, 2.0), (2, 0.5)]])
        >>> found.sizes.tolist(), found.losses.tolist(), found.within(2.0)
        ([2, 3, 4, 5], [7.0, 5.5, 3.0, 1.5], (1, 1))
    """
    if any(len(options) == 0 for options in items):
        raise ValueError("every item needs at least one option")
    most = max(2, most_cells // max(1, len(items)))
    sizes, losses, is_exact = np.zeros(1, dtype=np.int64), np.zeros(1), True
    chosen: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    for options in items:
        added = np.array([size for size, _ in options], dtype=np.int64)
        harm = np.array([math.inf if math.isnan(loss) else loss for _, loss in options])
        all_sizes, all_losses = (added[:, None] + sizes).ravel(), (harm[:, None] + losses).ravel()
        kept = _undominated(all_sizes, all_losses)
        if len(kept) > most:
            kept, is_exact = kept[_thinned(all_sizes[kept], most)], False
        chosen.append((kept // len(sizes)).astype(np.uint8 if len(options) < 256 else np.int32))
        parents.append((kept % len(sizes)).astype(np.int32))
        sizes, losses = all_sizes[kept], all_losses[kept]
    return Frontier(sizes, losses, is_exact, tuple(chosen), tuple(parents))


def _undominated(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices, smallest size first, of what has a smaller loss than everything that is not larger."""
    order = np.lexsort((losses, sizes))
    best_before = np.concatenate([[math.inf], np.minimum.accumulate(losses[order])[:-1]])
    kept = losses[order] < best_before
    kept[0] = True  # all may be infinite
    return order[kept]


def _thinned(sizes: np.ndarray, most: int) -> np.ndarray:
    """Indices of the last in each of `most` even ranges of size, and of the smallest."""
    edges = np.linspace(sizes[0], sizes[-1], most)
    last = np.searchsorted(sizes, edges, side="right") - 1
    return np.unique(np.concatenate([[0], last]))
