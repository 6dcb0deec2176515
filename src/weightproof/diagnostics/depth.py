"""Of what use the blocks are: scores with them against scores without, paired by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightproof.errors import InputError
from weightproof.statistics.paired import Interval, PairedSums, interval
from weightproof.statistics.proportions import newcombe, paired_counts

__all__ = ["DepthReading", "depth_from_means", "depth_from_scores", "depth_from_sums"]

_ACCURACY = "accuracy"


@dataclass(frozen=True, slots=True)
class DepthReading:
    """How much better a network is than one or more baselines, on the same items.

    Attributes:
        intervals: Of each baseline; positive where the network is better. Ends are None where they are not known.
        names: What each baseline is without: the name of a block, or "all blocks".
        baseline: What the baselines are, in words.
        unit: What is better: "accuracy", "loss (nats per token)", or the user's metric.
        score: Mean score of the network.
        baseline_score: That of the best baseline.
    """

    intervals: tuple[Interval, ...]
    names: tuple[str, ...]
    baseline: str
    unit: str
    score: float
    baseline_score: float


def depth_from_scores(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    *,
    metric: str = _ACCURACY,
    higher_is_better: bool = True,
    baseline: str = "the same network with frozen random blocks",
) -> DepthReading:
    """Compare a network with a baseline, item by item.

    Args:
        scores: One an item; 1 and 0 (or shares) for "accuracy".
        baseline_scores: Of the same items in the same order.
        metric: Its name.
        higher_is_better: False for losses.
        baseline: What it is, in words.

    Raises:
        InputError: If the two differ in length or hold what no score can be, such as an accuracy in percent.
    """
    after, before = np.asarray(scores, dtype=np.float64), np.asarray(baseline_scores, dtype=np.float64)
    if after.shape != before.shape or after.ndim != 1 or not after.size:
        raise InputError(f"scores are not paired: {after.shape} of the network and {before.shape} of the baseline")
    found = _paired(before, after, metric, higher_is_better=higher_is_better)
    return DepthReading((found,), ("all blocks",), baseline, metric, float(after.mean()), float(before.mean()))


def depth_from_sums(
    network: tuple[np.ndarray, np.ndarray], without: Sequence[np.ndarray], names: Sequence[str], baseline: str
) -> DepthReading:
    """Compare losses of windows with those of networks that lack one block each.

    Args:
        network: (windows,) sums of losses, and the scored tokens of each.
        without: The same sums, for each block.
        names: Of the blocks.
        baseline: What was done to the block, in words.

    Raises:
        InputError: If a sum is not finite.
    """
    sums, counts = network
    paired = [PairedSums(sums, other, counts) for other in without]
    means = [float(other.sum() / counts.sum()) for other in without]
    intervals = tuple(interval(one) for one in paired)
    return DepthReading(
        intervals, tuple(names), baseline, "loss (nats per token)", float(sums.sum() / counts.sum()), max(means)
    )


def depth_from_means(score: float, baseline_score: float, num_items: int | None = None) -> DepthReading:
    """Compare two accuracies of which only the means are known, with the number of items where it is known.

    Without pairs the interval is that of two independent shares, which is wider than the paired one.

    Raises:
        InputError: If an accuracy is not in [0, 1].
    """
    for name, value in (("accuracy", score), ("baseline's accuracy", baseline_score)):
        if math.isfinite(value) and not 0 <= value <= 1:
            raise InputError(f"the {name} must be a share in [0, 1], not {value:g} (percent?)")
    difference, lower, upper = score - baseline_score, None, None
    if num_items is not None and math.isfinite(difference):
        if num_items < 1:
            raise InputError(f"num_items must be at least 1, not {num_items}")
        error = math.sqrt((score * (1 - score) + baseline_score * (1 - baseline_score)) / num_items)
        lower, upper = difference - 1.96 * error, difference + 1.96 * error
    size = 0 if num_items is None else num_items
    found = Interval(difference, lower, upper, 0.95, float(size), size, "two-shares")
    words = "the same network with frozen random blocks"
    return DepthReading((found,), ("all blocks",), words, _ACCURACY, score, baseline_score)


def _paired(before: np.ndarray, after: np.ndarray, metric: str, *, higher_is_better: bool) -> Interval:
    """Of baseline and network; positive where the network is better."""
    both = np.concatenate([before, after])
    if metric == _ACCURACY and np.isfinite(both).all() and (both.min() < 0 or both.max() > 1):
        raise InputError(f"an accuracy must be a share in [0, 1], not {both.max():g} (percent?)")
    if not np.isfinite(both).all():
        return Interval(math.nan, None, None, 0.95, float(len(after)), len(after), "none")
    if metric == _ACCURACY and higher_is_better and np.isin(both, (0.0, 1.0)).all():
        return newcombe(paired_counts(_answers(before), _answers(after)))
    first, second = (before, after) if higher_is_better else (after, before)
    return interval(PairedSums.of_scores(first, second))


def _answers(scores: np.ndarray) -> list[str]:
    return ["right" if one else "wrong" for one in scores]
