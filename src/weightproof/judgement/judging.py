"""Readings -> verdicts -> decision: pure functions, the same in a session, in `certify` and in `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weightproof.policy import Policy, decide
from weightproof.registry import load_plugin, plugins
from weightproof.statistics.window_reports import FAMILY
from weightproof.types import Decision, Outcome, Readings, Verdict

# Guards that decide in a window of ordinary training; the others are reported there.
JUDGED_IN_TRAINING = ("invariants", "spectral", "health")
GUARDS = "weightproof.guards"


@dataclass(frozen=True, slots=True)
class Judged:
    """The readings that one decision was made from.

    Attributes:
        before: Of the baseline: drift counts from there.
        reference: Of the state just before the change: what an edit declared concerns this one.
        after: Of the changed model, with its `edit`.
    """

    before: Readings
    reference: Readings
    after: Readings


def judge_one(guard: Any, limits: Any, judged: Judged) -> Verdict:
    """The verdict of one guard under its limits."""
    # What counts as untrained is what the baseline had not learned, not what the change left behind.
    after = replace(judged.after, untrained=judged.before.untrained)
    exact = guard.tier == "T0"
    return guard.judge(_finite_as(judged.before, judged.reference) if exact else judged.before, after, limits)


def is_asked(guard: Any, after: Readings) -> bool:
    """Whether a guard gives a verdict on these readings.

    All do but `optional` ones: they speak where what they need was read, or was to be read and could not be.
    """
    if not getattr(guard, "optional", False):
        return True
    return any(getattr(after, need, None) or need in after.unmeasured for need in guard.needs)


def judge_all(policy: Policy, judged: Judged) -> dict[str, Verdict]:
    """The verdict of every registered guard that is asked under the limits of a policy, by name."""
    found: dict[str, Verdict] = {}
    for name in plugins(GUARDS):
        guard = load_plugin(GUARDS, name)()
        if is_asked(guard, judged.after):
            found[name] = judge_one(guard, policy.limits_for(type(guard)), judged)
    return found


def decide_on(policy: Policy, verdicts: Mapping[str, Verdict], *, kind: str, step: int, world_size: int) -> Decision:
    """The decision on a change of this kind; in training most guards only report."""
    judged = [verdict for name, verdict in verdicts.items() if kind != "train" or name in JUDGED_IN_TRAINING]
    reported = [item for verdict in judged for item in verdict.measurements if item.family == FAMILY]
    for verdict in verdicts.values():
        if verdict not in judged:
            reported += [replace(item, limit=None, outcome=Outcome.PASS) for item in verdict.measurements]
    # What a guard only reports of a window of training is no part of its verdict.
    judged = [
        replace(one, measurements=tuple(item for item in one.measurements if item.family != FAMILY)) for one in judged
    ]
    return decide(policy, tuple(judged), kind=kind, step=step, reported=tuple(reported), world_size=world_size)


def _finite_as(baseline: Readings, current: Readings) -> Readings:
    """`current` with the baseline's counts of NaN and inf: what monitor mode kept broken may still be repaired."""
    if not any(reading.num_nonfinite for reading in current.tensors.values()):
        return current
    tensors = {
        name: replace(reading, num_nonfinite=baseline.tensors[name].num_nonfinite)
        if name in baseline.tensors
        else reading
        for name, reading in current.tensors.items()
    }
    return replace(current, tensors=tensors)
