"""Sums over groups of windows, before and after a change, and the readings made of them.

Held in memory are a few numbers for each of at most `loss_windows.MAX_GROUPS` groups, however many windows there
are. Rates (every score 0 or 1) are compared by Newcombe's interval for paired proportions, everything else by
`weightproof.statistics.paired`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from weightproof.loss_data.scores import Metric
from weightproof.loss_data.windows import Chunk, LossWindows
from weightproof.statistics.paired import (
    MIN_GROUPS_TO_ACCEPT,
    MIN_SEQUENTIAL_SIZE,
    SEQUENTIAL_SHARE,
    Interval,
    PairedSums,
    interval,
)
from weightproof.statistics.proportions import PairedCounts, mcnemar, newcombe
from weightproof.types import LossReading

if TYPE_CHECKING:
    from weightproof.guards.loss import LossLimits

_REPLICATES = 5000
# Resamples beyond both ends of an interval together, where alpha is so small that the usual number leaves fewer.
_IN_TAILS = 20


class LossTally:
    """What was read of one role so far.

    Attributes:
        windows_used: Windows of the groups that were read to their end.
        tokens_used: Their scored tokens.
        is_broken: Whether a loss after the change is NaN or infinite.
    """

    def __init__(self, role: str, windows: LossWindows, metrics: tuple[Metric, ...], limits: LossLimits) -> None:
        self._role, self._windows, self._metrics, self._limits = role, windows, metrics, limits
        shape = (windows.num_groups, len(metrics))
        self._before, self._after = np.zeros(shape), np.zeros(shape)
        self._tokens = np.zeros(windows.num_groups)
        self._sizes = np.zeros(windows.num_groups)
        self._counts: list[tuple[int, ...]] = [(0, 0, 0, 0)] * len(
            metrics
        )  # right before and after, before, after, never
        self._is_rate = [metric.name != "nll" for metric in metrics]
        self._num_groups = 0
        self._is_all = False
        self.is_broken = False

    def add(self, chunk: Chunk, before: np.ndarray, after: np.ndarray) -> None:
        """Add the scores of a chunk (windows, metrics); chunks come in reading order."""
        self.is_broken = self.is_broken or not bool(np.isfinite(after).all())
        groups = np.array(chunk.groups)
        # Added one after another: the same bits however the windows were dealt.
        np.add.at(self._before, groups, before)
        np.add.at(self._after, groups, after)
        np.add.at(self._tokens, groups, [item.num_scored for item in chunk.items])
        np.add.at(self._sizes, groups, 1.0)
        for index in range(len(self._metrics)):
            self._count(index, before[:, index], after[:, index])
        self._is_all = chunk.stop == self._windows.num_windows
        ends_here = self._is_all or self._windows.num_groups == self._windows.num_windows
        self._num_groups = chunk.groups[-1] + int(ends_here)

    def _count(self, index: int, before: np.ndarray, after: np.ndarray) -> None:
        """Count pairs of right and wrong answers, as long as every score is 1 or 0."""
        self._is_rate[index] = self._is_rate[index] and bool(np.isin([before, after], (0.0, 1.0)).all())
        if self._is_rate[index]:
            right, still = before == 1.0, after == 1.0
            pairs = (right & still, right & ~still, ~right & still, ~right & ~still)
            self._counts[index] = tuple(a + int(b.sum()) for a, b in zip(self._counts[index], pairs, strict=True))

    @property
    def windows_used(self) -> int:
        """Windows of whole groups."""
        return int(self._sizes[: self._num_groups].sum())

    @property
    def tokens_used(self) -> int:
        """Scored tokens of whole groups; windows, where each gives one score."""
        return int(self._tokens[: self._num_groups].sum()) if self._metrics[0].per_token else self.windows_used

    @property
    def may_accept_early(self) -> bool:
        """Whether a test may stop here and accept: not on few documents, however many windows they have.

        Nor for rates, whose counts say nothing while they are 0.
        """
        return self._num_groups >= MIN_GROUPS_TO_ACCEPT and not any(self._is_rate)

    def readings_so_far(self) -> list[LossReading]:
        """One reading a metric, with intervals that allow stopping; [] before they can say anything."""
        if self._num_groups < 2 or self.is_broken:
            return []
        alpha = SEQUENTIAL_SHARE * self._limits.alpha
        return [self._reading(index, self._sequential(index, alpha)) for index in range(len(self._metrics))]

    def readings(self) -> list[LossReading]:
        """One reading a metric: of everything, or of where the test stopped."""
        if self.is_broken:
            return [
                self._broken(index, "the loss after the change is not finite") for index in range(len(self._metrics))
            ]
        if not self._is_all:
            return self.readings_so_far()
        return [self._reading(index, self._final(index)) for index in range(len(self._metrics))]

    def failed(self, before: np.ndarray, method: str) -> list[LossReading]:
        """The readings where no forward pass succeeds any more: infinitely worse on all windows."""
        for index, metric in enumerate(self._metrics):
            self._before[:, index], self._after[:, index] = 0.0, 0.0
            self._before[0, index] = float(before[:, index].sum())
            self._after[0, index] = -math.inf if metric.higher_is_better else math.inf
        self._tokens[:], self._sizes[:] = 0.0, 0.0
        self._tokens[0], self._sizes[0] = self._windows.num_tokens, self._windows.num_windows
        self._num_groups = self._windows.num_groups
        return [self._broken(index, method) for index in range(len(self._metrics))]

    # -- intervals ---------------------------------------------------------------------------------

    def _weight(self, index: int) -> np.ndarray:
        return self._tokens if self._metrics[index].per_token else self._sizes

    def _sums(self, index: int) -> PairedSums:
        used = slice(0, self._num_groups)
        return PairedSums(self._before[used, index], self._after[used, index], self._weight(index)[used])

    def _sequential(self, index: int, alpha: float) -> Interval:
        size = max(self._limits.min_effective_size, MIN_SEQUENTIAL_SIZE)
        return interval(self._sums(index), alpha=alpha, method="confidence-sequence", min_effective_size=size)

    def _final(self, index: int) -> Interval:
        """The interval of everything, at the error that looking earlier has left."""
        alpha, size = (1.0 - SEQUENTIAL_SHARE) * self._limits.alpha, self._limits.min_effective_size
        if self._is_rate[index] and not self._windows.has_documents:
            return newcombe(PairedCounts(*self._counts[index]), alpha=alpha, min_examples=math.ceil(size))
        # Examples of one document are not independent: documents are resampled, for rates too.
        replicates = max(_REPLICATES, math.ceil(_IN_TAILS / alpha))
        return interval(self._sums(index), alpha=alpha, replicates=replicates, min_effective_size=size)

    # -- readings ----------------------------------------------------------------------------------

    def _reading(self, index: int, found: Interval) -> LossReading:
        used = slice(0, self._num_groups)
        sums = self._shown_sums(index, used)
        return LossReading(
            **self._about(index, sums),
            difference=found.estimate,
            lower=found.lower,
            upper=found.upper,
            confidence=found.confidence,
            effective_size=found.effective_size,
            method=found.method,
            undecided=found.undecided,
            sums=sums,
        )

    def _broken(self, index: int, method: str) -> LossReading:
        """Of everything read, whole groups or not: a loss that is not finite counts wherever it is."""
        sums = self._shown_sums(index, slice(None))
        return LossReading(
            **self._about(index, sums),
            difference=(sums["after"] - sums["before"]) / sums["weight"],
            lower=None,
            upper=None,
            confidence=None,
            effective_size=None,
            method=method,
            sums=sums,
        )

    def _about(self, index: int, sums: Mapping[str, float]) -> dict[str, Any]:
        metric = self._metrics[index]
        return {
            "role": self._role,
            "windows_digest": self._windows.digest,
            "metric": metric.name,
            "num_windows": self._windows.num_windows,
            "num_groups": self._windows.num_groups,
            "num_tokens": self._windows.num_tokens if metric.per_token else self._windows.num_windows,
            "num_used": self._num_groups,
            "tokens_used": int(sums["weight"]),
            "before": sums["before"] / sums["weight"],
            "after": sums["after"] / sums["weight"],
        }

    def _shown_sums(self, index: int, used: slice) -> dict[str, float]:
        before, after = self._before[used, index], self._after[used, index]
        shown = {"before": float(before.sum()), "after": float(after.sum())}
        shown["weight"] = float(self._weight(index)[used].sum())
        shown["higher_is_better"] = float(self._metrics[index].higher_is_better)
        if self._is_rate[index] and self._is_all:
            counts = PairedCounts(*self._counts[index])
            shown |= {name: float(getattr(counts, name)) for name in ("both", "lost", "gained", "neither")}
            shown["mcnemar_p"] = mcnemar(counts)
        return shown


def reading_without_numbers(role: str, metric: str, windows: LossWindows | None, reason: str) -> LossReading:
    """A reading that was not made, with what is known of its windows."""
    return LossReading(
        role=role,
        windows_digest="" if windows is None else windows.digest,
        metric=metric,
        num_windows=0 if windows is None else windows.num_windows,
        num_groups=0 if windows is None else windows.num_groups,
        num_tokens=0 if windows is None else windows.num_tokens,
        num_used=0,
        tokens_used=0,
        before=None,
        after=None,
        difference=None,
        lower=None,
        upper=None,
        confidence=None,
        effective_size=None,
        method="none",
        reason=reason,
    )
