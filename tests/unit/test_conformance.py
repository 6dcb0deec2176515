"""Our own guards and edits keep to the rules of the conformance kit, and the kit finds what breaks them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from weightproof import edits, kinds
from weightproof.errors import PolicyError
from weightproof.guards.conclude import conclude
from weightproof.registry import load_plugin, plugins
from weightproof.testing import check_edit, check_guard
from weightproof.types import Measurement, Outcome, Readings, Verdict

GUARDS = sorted(plugins("weightproof.guards"))
EDITS = {
    "rtn": edits.RTN(bits=8),
    "prune": edits.Prune(sparsity=0.3),
    "prune 2:4": edits.Prune(sparsity=0.5, pattern="2:4"),
    "svd": edits.SVD(energy=0.99),
    "gptq": edits.GPTQ(bits=4),
}


@pytest.mark.parametrize("name", GUARDS)
def test_our_guards_conform(name):
    check_guard(load_plugin("weightproof.guards", name))


@pytest.mark.parametrize("name", EDITS)
def test_our_edits_conform(name):
    check_edit(EDITS[name])


@dataclass(frozen=True)
class Allowed:
    """Limits.

    Attributes:
        share: Of changed tensors; chosen for this test.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not self.share >= 0:
            raise PolicyError("'share' must be a number from 0")


class Changed:
    """A guard as a plug-in would have it: the share of matrices that changed."""

    name: ClassVar[str] = "changed"
    tier: ClassVar[str] = "T1"
    needs: ClassVar[frozenset[str]] = frozenset({"matrices"})
    Limits: ClassVar[Any] = Allowed

    def judge(self, before: Readings, after: Readings, limits: Allowed) -> Verdict:
        moved = [name for name, one in after.matrices.items() if one != before.matrices.get(name)]
        if not after.matrices:
            return conclude(self.name, [], coverage=(0, 0), nothing="no matrix was read")
        value = len(moved) / len(after.matrices)
        outcome = Outcome.WARN if value > limits.share else Outcome.PASS
        one = Measurement(self.name, "model", "share_changed", value, 0.0, limits.share, outcome=outcome)
        return conclude(self.name, [one], coverage=(1, 1), nothing="")


def test_a_plugin_that_keeps_the_rules_passes():
    check_guard(Changed)


class PassesUnread(Changed):
    def judge(self, before, after, limits):
        return replace(super().judge(before, after, limits), outcome=Outcome.PASS)


class RaisesAlways(Changed):
    def judge(self, before, after, limits):
        found = super().judge(before, after, limits)
        raised = [replace(one, outcome=Outcome.FAIL) for one in found.measurements]
        return replace(found, outcome=Outcome.FAIL, measurements=tuple(raised))


class Moody(Changed):
    calls = 0

    def judge(self, before, after, limits):
        Moody.calls += 1
        return replace(super().judge(before, after, limits), reason=f"call {Moody.calls}")


@dataclass(frozen=True)
class Silent:
    """Limits of which nothing is said."""

    share: float = 0.5


class Unfounded(Changed):
    Limits = Silent


@dataclass(frozen=True)
class Lenient:
    """Limits.

    Attributes:
        share: Of changed tensors.
    """

    share: float = 0.5


class TakesNan(Changed):
    Limits = Lenient


@pytest.mark.parametrize(
    ("guard", "rule"),
    [
        (PassesUnread, "passes"),
        (RaisesAlways, "raises FAIL where a matrix moved by a millionth"),
        (Moody, "two verdicts"),
        (Unfounded, "says nothing of where its limit 'share' comes from"),
        (TakesNan, "takes NaN"),
    ],
)
def test_a_guard_that_breaks_a_rule_is_told_which(guard, rule):
    with pytest.raises(AssertionError, match=rule):
        check_guard(guard)


@dataclass(frozen=True)
class Scaled:
    """An edit that multiplies every matrix."""

    factor: float = 1.01
    name = "scaled"
    kind = kinds.Plain("unknown")

    def params(self):
        return {"factor": self.factor}

    def selects(self, matrix):
        return matrix.family == "ffn"

    def plan(self, matrix, context):
        return matrix.load() * self.factor


class InPlace(Scaled):
    def plan(self, matrix, context):
        return matrix.load().mul_(self.factor)


class NotFinite(Scaled):
    def plan(self, matrix, context):
        return matrix.load() * math.nan


class Random(Scaled):
    def plan(self, matrix, context):
        return matrix.load() + matrix.load().new_empty(()).uniform_()


class Overstated(Scaled):
    kind = kinds.Quantize(4)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (InPlace(), "in the model's own memory"),
        (NotFinite(), "not finite"),
        (Random(), "differently the second time"),
        (Overstated(), "breaks its own contract"),
    ],
)
def test_an_edit_that_breaks_a_rule_is_told_which(edit, rule):
    with pytest.raises(AssertionError, match=rule):
        check_edit(edit)


def test_an_edit_that_keeps_the_rules_passes():
    check_edit(Scaled())
