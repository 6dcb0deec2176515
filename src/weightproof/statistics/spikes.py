"""Spikes of the raw loss and of the gradient norm over a window of training steps. Pure functions of numbers.

Two questions, two strengths:

- `is_loss_spike`: does the end of a window lie above what was usual? It rejects nothing by itself: it is the
  witness that makes gross growth of a weight matrix count.
- `lasting_score`, `norm_score`, `is_gross_norm`: against an exponential moving average of the logarithms and of
  their spread. A window is rejected by them alone only where nobody would call it noise.

Moving average and spread with a start-up of a few dozen values, outliers kept out of both: ZClip (arXiv 2504.02507),
which uses a decay of .97 and 25 values, and clips from a z-score of 2.5 on. Going back some steps and leaving the
batches out is what PaLM did with spikes that lasted (arXiv 2204.02311, section 5.1). The limits here are far wider than
ZClip's: clipping a healthy step costs little, taking back a healthy window costs the window. Logarithms, because
losses fall and gradient norms wander by factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

# A healthy loss wanders by a few robust standard deviations; both tests must agree, so that a
# nearly constant loss (tiny spread) does not make noise look like a spike.
SPREADS = 6.0
RATIO = 1.2
LAST = 3
# Long enough for a spread, short enough that a loss still falling does not hide a jump back up.
MEMORY = 24

# ---- the moving average (ZClip) ----
DECAY = 0.97
START_UP = 25
# How many accepted values are remembered: what is older weighs less than 2 % (.97^128).
HISTORY = 128
# No spread of a logarithm is taken for smaller than this: 2 % wandering is never remarkable.
LEAST_SPREAD = 0.02

# The last values alone: what one step is held against while a loss still falls.
RECENT = 16

# A loss most of the way from the usual to that of guessing (the logarithm of the number of symbols): what has hardly
# anything to learn in it gives that, step after step. So many steps of a window, and such a share of it, reject it.
NEAR_GUESSING = 0.7
LEARNED = 0.8
MIN_NEAR = 2
NEAR_SHARE = 0.2

# A rise of the loss that acts by itself: by half, by a quarter of a nat, and by 8 spreads, at each of the last steps.
LASTING_Z = 8.0
LASTING_RATIO = 1.5
LASTING_RISE = 0.25
# Or by a quarter above all that are remembered, whatever the spread.
WORST_RATIO = 1.25
# A gradient norm that is a witness beside a loss spike; and one that no optimizer step should be taken with.
NORM_Z = 6.0
NORM_RATIO = 5.0
GROSS_NORM_RATIO = 100.0
# Steps of one window that may be left out for such a gradient: more are no accident, and the window is rejected.
MAX_SKIPPED = 2


def is_loss_spike(history: Sequence[float], window: Sequence[float]) -> bool | None:
    """Whether the end of `window` lies far above what `history` was used to.

    The mean of the last three raw losses of the window is compared with the median of the last 24
    accepted ones: a spike exceeds it by six robust standard deviations (1.4826 MAD) and by 20 %.

    Args:
        history: Raw losses of accepted windows, oldest first.
        window: Raw losses since the last accepted window.

    Returns:
        None when either side is too short (fewer than 8 accepted losses, no new one) to tell.
        A loss that is not finite is a spike.
    """
    if any(not math.isfinite(loss) for loss in window):
        return True
    known = list(history)[-MEMORY:]
    if len(known) < 8 or not window:
        return None
    centre = median(known)
    spread = 1.4826 * median(abs(loss - centre) for loss in known)
    recent = fmean(list(window)[-LAST:])
    return recent > centre + SPREADS * spread and recent > RATIO * centre


@dataclass(frozen=True, slots=True)
class Level:
    """What a positive quantity is used to: mean and spread of its logarithm."""

    mean: float
    spread: float

    def score(self, value: float) -> Score:
        """How far a value lies above it; one that is not finite lies infinitely far."""
        usual = math.exp(self.mean)
        if not math.isfinite(value):
            return Score(math.inf, math.inf, math.inf)
        if value <= 0.0:
            return Score(-math.inf, 0.0, -usual)
        z = (math.log(value) - self.mean) / self.spread
        return Score(z, value / usual, value - usual)


@dataclass(frozen=True, slots=True)
class Score:
    """A value against a `Level`: `z` in spreads of the logarithm, `ratio` to the usual value, `rise` above it."""

    z: float
    ratio: float
    rise: float

    def beyond(self, z: float, ratio: float) -> bool:
        """Whether it exceeds both limits."""
        return self.z >= z and self.ratio >= ratio


def level_of(history: Sequence[float]) -> Level | None:
    """The moving average over accepted values, oldest first; None before `START_UP` of them.

    It starts with the median and the robust deviation (1.4826 MAD) of the first `START_UP`; each later value moves
    it by 3 %, one beyond 3 spreads as if it lay there. Values that are zero or not finite (a batch without labels)
    teach nothing.
    """
    logs = [math.log(value) for value in history if math.isfinite(value) and value > 0.0][-HISTORY:]
    if len(logs) < START_UP:
        return None
    first, rest = logs[:START_UP], logs[START_UP:]
    mean = median(first)
    variance = (1.4826 * median(abs(value - mean) for value in first)) ** 2
    for value in rest:
        spread = max(math.sqrt(variance), LEAST_SPREAD)
        within = min(max(value - mean, -3.0 * spread), 3.0 * spread)
        variance = DECAY * (variance + (1.0 - DECAY) * within**2)
        mean += (1.0 - DECAY) * within
    return Level(mean, max(math.sqrt(variance), LEAST_SPREAD))


def recent_level(history: Sequence[float]) -> Level | None:
    """Median of the last `RECENT` values, and the spread around the trend of all; None before there are so many.

    The spread is told by differences of neighbours (their deviation is 1.41 times that of the values), so that a loss
    that falls steeply has no wider one than a loss that stays.
    """
    logs = [math.log(value) for value in history if math.isfinite(value) and value > 0.0][-HISTORY:]
    if len(logs) < RECENT:
        return None
    steps = [abs(late - early) for early, late in itertools.pairwise(logs)]
    return Level(median(logs[-RECENT:]), max(1.4826 * median(steps) / math.sqrt(2.0), LEAST_SPREAD))


def num_near_guessing(history: Sequence[float], window: Sequence[float], guessing: float | None) -> int | None:
    """Steps of a window whose loss is about that of a model that guesses, with those just before it.

    Symbols drawn at random cost the logarithm of their number at least, whatever a model has learned; text that is
    merely hard costs much less. Near is seven tenths of the way there from the usual, and beyond 6 spreads.

    Args:
        history: Raw losses of windows that were kept, oldest first.
        window: Raw losses since then.
        guessing: Loss of guessing, nats per token; None where it is not known.

    Returns:
        None where it is not known, or where the model was hardly better than guessing before.
    """
    level = recent_level(history)
    if guessing is None or level is None or math.exp(level.mean) > LEARNED * guessing:
        return None
    usual = math.exp(level.mean)
    near = max(usual + NEAR_GUESSING * (guessing - usual), math.exp(level.mean + SPREADS * level.spread))
    known = [loss for loss in history if math.isfinite(loss)][-RECENT:]
    before = next((count for count, loss in enumerate(reversed(known)) if loss < near), 0)
    return sum(not loss < near for loss in window) + (before if window and not window[0] < near else 0)


def most_near(num_steps: int) -> int:
    """How many steps of a window may be near guessing before it is rejected.

    Taking a window back costs its other steps, too: a few bad ones among many do less harm than that.
    """
    return max(MIN_NEAR, math.ceil(NEAR_SHARE * num_steps)) - 1


def lasting_score(history: Sequence[float], window: Sequence[float]) -> Score | None:
    """The mildest of the last three raw losses against what was usual before them.

    Args:
        history: Raw losses of accepted windows, oldest first.
        window: Raw losses since then. One that is shorter than three is seen with the end of the history.

    Returns:
        None where too little is known (fewer than `START_UP` accepted losses, no new one).
    """
    if not window:
        return None
    borrowed = max(0, LAST - len(window))
    known = history[: len(history) - borrowed]
    last = [*history[len(known) :], *window][-LAST:]
    if len(last) < LAST:
        return None
    scores = [score for value in last if (score := _loss_score(known, value)) is not None]
    return min(scores, key=lambda score: score.z, default=None)


def _loss_score(history: Sequence[float], value: float) -> Score | None:
    """A loss against what was usual; one that is worse than all that are remembered counts as 8 spreads above.

    A loss that fell steeply until now has a spread so wide that hardly anything lies 8 of them above. But worse by a
    quarter than at the beginning is worse than guessing. Where nothing fell, a sudden rise proves less.
    """
    level = level_of(history)
    if level is None:
        return None
    score = level.score(value)
    highest = max((one for one in history[-HISTORY:] if math.isfinite(one)), default=0.0)
    if value > WORST_RATIO * max(highest, LASTING_RATIO * math.exp(level.mean)):
        return Score(max(score.z, LASTING_Z), score.ratio, score.rise)
    return score


def is_lasting(score: Score | None) -> bool:
    """Whether a loss rose so far, and stayed there, that it rejects a window by itself.

    By 8 spreads, by half of what was usual, and by a quarter of a nat: with losses near zero halves are nothing.
    """
    return score is not None and score.beyond(LASTING_Z, LASTING_RATIO) and score.rise >= LASTING_RISE


def is_witnessed(loss: Score | None, norm: Score | None) -> bool:
    """Whether a smaller lasting rise of the loss is no noise, because a gradient norm leapt in the same window.

    The loss by 6 spreads and a fifth at each of the last steps, the norm by 6 spreads and five times the usual.
    """
    if loss is None or norm is None:
        return False
    return loss.beyond(SPREADS, RATIO) and norm.beyond(NORM_Z, NORM_RATIO)


def is_high(history: Sequence[float], loss: float) -> bool:
    """Whether one loss lies as far above what was usual as a lasting rise does (see `is_lasting`)."""
    return is_lasting(_loss_score(history, loss))


def norm_score(history: Sequence[float], norms: Sequence[float]) -> Score | None:
    """The largest gradient norm of a window against what was usual; None where too little is known."""
    level = level_of(history)
    if level is None or not norms:
        return None
    return max((level.score(norm) for norm in norms), key=lambda score: score.z)


def is_gross_norm(history: Sequence[float], norm: float) -> bool:
    """Whether no optimizer step should be taken with such a gradient: not finite, or 100 times the usual and more.

    Args:
        history: Norms of the steps that were taken, oldest first.
        norm: Of the step that is about to be taken.
    """
    if not math.isfinite(norm):
        return True
    level = level_of(history)
    return level is not None and level.score(norm).beyond(NORM_Z, GROSS_NORM_RATIO)
