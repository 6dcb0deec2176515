"""What is noted of a window of training and judged by nobody: its worst step, rate, moments, weights. Pure functions.

A mild fault (a bad batch, a flipped bit, a learning rate that leapt once) is let pass, since going back costs more than
it does. But it must not pass unseen: each number here has a reference, what was usual before, and a level from which it
is noted. Noted is no verdict: nothing is taken back for it. Levels lie where healthy training hardly ever comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from weightproof.statistics.spikes import recent_level
from weightproof.types import Decision, Measurement, WindowReport

__all__ = [
    "FAMILY",
    "Usual",
    "is_noted",
    "loss_peak",
    "measurement_of",
    "moment_growth",
    "norm_peak",
    "noted",
    "rate_peak",
    "slowest_step",
    "weight_move",
    "words_of_report",
    "worst_reports",
]

# Of measurements that are reports: the decision carries them beside the verdicts.
FAMILY = "window"

# One step against the last ones: spreads of the logarithm, and how many times the usual at least.
PEAK_Z = 5.0
LOSS_RATIO = 1.15
NORM_RATIO = 2.0
# A learning rate against the largest that was stepped with, or that the schedule was made with.
RATE_RATIO = 1.05
# The largest element of one moment, and the change of one tensor, against what was usual of the same tensor.
GROWTH_RATIO = 4.0
MOVE_RATIO = 2.0
# From the forward pass to the end of the optimizer's step.
SLOW_RATIO = 10.0
SLOW_SECONDS = 1.0
# What was usual fades so slowly that a schedule that restarts is not new to it.
FADING = 0.98
# Windows before something counts as known.
KNOWN = 3

_NOTED = "noted"
# Of one tensor among many, each with a size of its own: told in times the usual.
_RATIOS = ("gain_move", "moment_growth", "weight_move")
_WORDS = {
    "gain_move": "change of a gain or bias",
    "loss_peak": "raw loss of a step",
    "moment_growth": "largest element of an optimizer moment",
    "norm_peak": "gradient norm of a step",
    "rate_peak": "learning rate of a step",
    "slowest_step": "seconds of a step",
    "weight_move": "change of a matrix",
}


def is_noted(measurement: Measurement) -> bool:
    """Whether a reported number lies at or beyond the level from which it is noted."""
    return measurement.family == FAMILY and (measurement.reason or "").startswith(f"{_NOTED}: ")


def noted(decision: Decision | None) -> tuple[Measurement, ...]:
    """What a decision reports and notes."""
    return () if decision is None else tuple(one for one in decision.reported if is_noted(one))


def words_of_report(measurement: Measurement) -> str:
    """A report for people: what it is of, its value, and what was usual."""
    words = _WORDS.get(measurement.statistic, measurement.statistic)
    value, usual = _short(measurement.value), _short(measurement.reference)
    against = "times the usual" if measurement.statistic in _RATIOS else f"(usual {usual})"
    return f"{words} {value} {against}, {measurement.reason}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def measurement_of(report: WindowReport) -> Measurement:
    """A report as a decision carries it: no limit, no outcome but PASS; the sentence says whether it is noted."""
    where = f" ({report.where})" if report.where else ""
    known = f"{_NOTED}: {report.level:.3g} or more" if report.is_noted else f"{_NOTED} from {report.level:.3g} on"
    return Measurement(
        "invariants", report.target, report.statistic, report.value, report.reference, None, FAMILY,
        reason=f"{known}{where}",
    )  # fmt: skip


def worst_reports(reports: Iterable[WindowReport]) -> tuple[WindowReport, ...]:
    """Of each statistic the one that lies farthest towards its level, in the order of the names."""
    worst: dict[str, WindowReport] = {}
    for one in reports:
        known = worst.get(one.statistic)
        if known is None or (one.share, one.where) > (known.share, known.where):
            worst[one.statistic] = one
    return tuple(worst[name] for name in sorted(worst))


def loss_peak(history: Sequence[float], window: Sequence[float]) -> WindowReport | None:
    """The largest raw loss of a window against the last ones before it; None where too little is known.

    Args:
        history: Raw losses of windows that were kept, oldest first.
        window: Raw losses since then.
    """
    return _peak("raw losses", "loss_peak", history, window, LOSS_RATIO)


def norm_peak(history: Sequence[float], norms: Sequence[float]) -> WindowReport | None:
    """The same of gradient norms."""
    return _peak("gradients", "norm_peak", history, norms, NORM_RATIO)


def _peak(
    target: str, statistic: str, history: Sequence[float], window: Sequence[float], ratio: float
) -> WindowReport | None:
    level = recent_level(history)
    if level is None or not window:
        return None
    usual = math.exp(level.mean)
    worst = max((value if math.isfinite(value) else math.inf) for value in window)
    return WindowReport(
        target, statistic, worst, usual, max(math.exp(level.mean + PEAK_Z * level.spread), ratio * usual)
    )


def rate_peak(rate: float, most: float) -> WindowReport | None:
    """A learning rate against the largest before it, or that its schedule was made with."""
    if most <= 0.0:
        return None
    return WindowReport("learning rate", "rate_peak", rate, most, RATE_RATIO * most)


def slowest_step(history: Sequence[float], seconds: Sequence[float], where: str) -> WindowReport | None:
    """The slowest step of one process, where it is slow enough to be noted; clocks are no evidence below that."""
    if len(history) < KNOWN or not seconds:
        return None
    usual = median(history)
    found = WindowReport("processes", "slowest_step", max(seconds), usual, max(SLOW_RATIO * usual, SLOW_SECONDS), where)
    return found if found.is_noted else None


def moment_growth(usual: Usual, sizes: Mapping[str, float]) -> WindowReport | None:
    """How many times the usual the largest element of one moment is: of the one that grew most."""
    return usual.worst("optimizer", "moment_growth", sizes, GROWTH_RATIO)


def weight_move(usual: Mapping[str, float], moves: Mapping[str, float | None]) -> WindowReport | None:
    """How many times as far as usual one tensor moved: the one that moved most.

    Args:
        usual: What was usual, in a window with learning rates as in this one.
        moves: How far each moved in this window.
    """
    return _farthest("weights", "weight_move", usual, moves, MOVE_RATIO)


def _farthest(
    target: str, statistic: str, usual: Mapping[str, float], found: Mapping[str, float | None], ratio: float
) -> WindowReport | None:
    """The value that lies farthest beyond what was usual of it; None where nothing is known of any."""
    reports = [
        WindowReport(target, statistic, value / usual[name], 1.0, ratio, name)
        for name, value in found.items()
        if value is not None and usual.get(name, 0.0) > 0.0
    ]
    return max(reports, key=lambda one: (one.share, one.where), default=None)


class Usual:
    """The largest of each of many positive numbers so far, fading slowly.

    One far beyond it teaches little, so that the next one is noted as well; but what stays is noted once.
    """

    def __init__(self) -> None:
        self._most: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._seen: dict[str, int] = {}

    def known(self, scale: float = 1.0) -> dict[str, float]:
        """What is usual of those that were seen in `KNOWN` windows or more, times `scale`."""
        return {
            name: scale * max(most, self._last[name]) for name, most in self._most.items() if self._seen[name] >= KNOWN
        }

    def learn(self, values: Mapping[str, float | None]) -> None:
        """Numbers of a window that was kept."""
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            count = self._seen[name] = self._seen.get(name, 0) + 1
            before = self._most.get(name, 0.0)
            capped = min(value, GROWTH_RATIO * before) if count > KNOWN else value
            self._most[name], self._last[name] = max(FADING * before, capped), value

    def worst(self, target: str, statistic: str, values: Mapping[str, float], ratio: float) -> WindowReport | None:
        """The value that lies farthest beyond what was usual of it; None where nothing is known of any."""
        return _farthest(target, statistic, self.known(), values, ratio)
