"""The largest alpha that the guards keep: tried on the model, judged by the session, taken back after each trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightproof.alpha.bounds import safe_alpha
from weightproof.alpha.fitting import require_alpha
from weightproof.deltas import Delta
from weightproof.edits.steering import Steer
from weightproof.errors import InputError
from weightproof.types import Action

if TYPE_CHECKING:
    from weightproof.session import GuardSession
    from weightproof.transactions.steps import Step

# From the bound that spectra give a search without a bracket goes up by this factor until something is rejected.
_GROWTH = 2.0


@dataclass(frozen=True)
class Trial:
    """One alpha, as the guards judged it.

    Attributes:
        alpha: What was tried.
        action: What the policy would do with it: KEEP, ROLLBACK or HALT.
        situation: In which situation of the policy.
        reason: In a sentence.
        kl: Largest KL over the windows that outputs are compared on, in nats per token; None where not measured.
        loss: Rise of the mean loss on the retain data, in nats per token; None where not measured.
        seconds: Of measuring and judging.
    """

    alpha: float
    action: str
    situation: str
    reason: str
    kl: float | None
    loss: float | None
    seconds: float

    @property
    def is_kept(self) -> bool:
        """Whether the guards would keep it."""
        return self.action == Action.KEEP


@dataclass(frozen=True)
class AlphaSearch:
    """What a search found.

    Attributes:
        alpha: The largest that was kept; None where none was.
        trials: All of them, in the order they were made.
        step: With `keep`, the guarded edit that put it in place; else None.
    """

    alpha: float | None
    trials: tuple[Trial, ...]
    step: Step | None = None

    @property
    def smallest_rejected(self) -> float | None:
        """The smallest alpha (in size) that the guards did not keep."""
        return min((one.alpha for one in self.trials if not one.is_kept), key=abs, default=None)


def search_alpha(  # noqa: PLR0913 - each is one choice of the search
    session: GuardSession,
    delta: Delta | Path | str,
    alphas: Sequence[float] | None = None,
    *,
    bracket: tuple[float, float] | None = None,
    tolerance: float = 0.05,
    max_trials: int = 16,
    same_base: bool = True,
    keep: bool = False,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> AlphaSearch:
    """The largest alpha at which the guards of a session keep W + alpha D.

    Every trial starts from the model as it is and is taken back and proven bit for bit; the model is unchanged
    afterwards unless `keep`. Each is one more look at the same windows. Trials stand in no certificate; what is kept in
    the end is judged again as one guarded edit.

    Args:
        session: Its guards, policy and data judge.
        delta: What is added.
        alphas: Try these, the largest first, until one is kept. None: bisect `bracket`.
        bracket: (low, high), the same sign: the high end is tried, then the low one, then the middle between the
            largest kept and the smallest rejected. None: from half the bound that spectra give (`safe_alpha`), upwards
            by doubling until one is rejected. Bisection takes it that what is rejected stays rejected further out.
        tolerance: Stop where the two are this close, relative to the larger.
        max_trials: Stop after this many.
        same_base: As in `steer`.
        keep: Put the one that was found in place, as a guarded edit of the session.
        on_trial: Told of each trial.

    Raises:
        InputError: The delta does not fit the model, or there is nothing to try.
        RestoreError: If a trial could not be taken back exactly.
    """
    delta = delta if isinstance(delta, Delta) else Delta.load(delta)
    trials: list[Trial] = []

    def kept(alpha: float) -> bool:
        trials.append(_trial(session, Steer(delta, alpha, same_base)))
        on_trial(trials[-1])
        return trials[-1].is_kept

    if max_trials < 1:
        raise InputError(f"max_trials must be 1 or more, not {max_trials}")
    if alphas is not None:
        if bracket is not None:
            raise InputError("give either alphas= or bracket=, not both")
        next((alpha for alpha in _largest_first(alphas)[:max_trials] if kept(alpha)), None)
    else:
        ends = _from_spectra(session, delta, same_base) if bracket is None else (*_bracket(bracket), False)
        _bisect(ends, kept, trials, tolerance, max_trials)
    found = max((one.alpha for one in trials if one.is_kept), key=abs, default=None)
    step = session.apply(Steer(delta, found, same_base)) if keep and found is not None else None
    return AlphaSearch(found, tuple(trials), step)


def _largest_first(alphas: Sequence[float]) -> list[float]:
    found = sorted({require_alpha(alpha) for alpha in alphas} - {0.0}, key=lambda alpha: (-abs(alpha), -alpha))
    if not found:
        raise InputError("alphas is empty, or holds only 0, which changes nothing: give what is to be tried")
    return found


def _bracket(given: tuple[float, float]) -> tuple[float, float]:
    low, high = sorted((require_alpha(end) for end in given), key=abs)
    if high == 0.0 or low * high < 0.0 or low == high:
        raise InputError(f"bracket must be two numbers of the same sign, the smaller may be 0, not {given!r}")
    return low, high


def _from_spectra(session: GuardSession, delta: Delta, same_base: bool) -> tuple[float, float, bool]:
    """(low, high, True: look further out than high)."""
    bound = safe_alpha(session.model, delta, session.policy, same_base=same_base).bound
    if not bound:
        raise InputError("the spectra give no bound to begin from (see safe_alpha): give alphas= or bracket=")
    return 0.0, bound / _GROWTH, True


def _bisect(
    ends: tuple[float, float, bool],
    kept: Callable[[float], bool],
    trials: Sequence[Trial],
    tolerance: float,
    max_trials: int,
) -> None:
    low, high, grows = ends
    while (is_kept := kept(high)) and grows and len(trials) < max_trials:
        low, high = high, high * _GROWTH
    if is_kept or (low and not _is_kept_at(trials, low) and (len(trials) >= max_trials or not kept(low))):
        return
    for middle in _middles(low, high, tolerance, trials):
        if len(trials) >= max_trials:
            return
        kept(middle)


def _is_kept_at(trials: Sequence[Trial], alpha: float) -> bool:
    """Whether an alpha was tried and kept."""
    return any(one.alpha == alpha and one.is_kept for one in trials)


def _middles(low: float, high: float, tolerance: float, trials: Sequence[Trial]) -> Iterator[float]:
    """What to try next; whoever iterates adds the trial of it before asking again."""
    while abs(high - low) > tolerance * abs(high):
        middle = (low + high) / 2
        yield middle
        low, high = (middle, high) if _is_kept_at(trials, middle) else (low, middle)


def _trial(session: GuardSession, edit: Steer) -> Trial:
    step = session.trial(edit)
    decision = step.decision
    assert decision is not None
    loss = next((one.difference for one in step.losses if one.role == "retain" and one.metric == "nll"), None)
    return Trial(
        alpha=edit.alpha,
        action=str(decision.action),
        situation=decision.situation,
        reason=decision.reason,
        kl=max((one.kl for one in step.divergence if one.kl is not None), default=None),
        loss=loss,
        seconds=step.seconds,
    )
