from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_readings import after, baseline

from weightproof.errors import PolicyError
from weightproof.guards.variance import Variance, VarianceLimits
from weightproof.types import Outcome

TAP = "random:blocks.1.mlp"


def judge(value: float | None, *, kind: str = "unknown", then: float = 1.5):
    before = baseline()
    moments = {key: now for key, now in {**before.second_moments, TAP: value}.items() if now is not None}
    before = replace(before, second_moments={**before.second_moments, TAP: then})
    return Variance().judge(before, replace(after(kind), second_moments=moments), VarianceLimits())


@pytest.mark.parametrize(
    ("value", "outcome", "training"),
    [
        (1.5, "PASS", "PASS"),
        (3.2, "PASS", "PASS"),
        (3.3, "WARN", "PASS"),
        (0.7, "PASS", "PASS"),
        (0.68, "WARN", "PASS"),
        (20.0, "FAIL", "PASS"),
        (0.1, "FAIL", "PASS"),
        (0.0, "FAIL", "FAIL"),
        (math.nan, "FAIL", "FAIL"),
        (math.inf, "FAIL", "FAIL"),
    ],
)
def test_second_moment_is_judged_against_its_baseline(value, outcome, training):
    found = judge(value)
    assert found.outcome == outcome
    assert judge(value, kind="train").outcome == training
    if outcome != "PASS":
        assert TAP in found.reason


def test_missing_tap_is_counted():
    found = judge(None)
    assert (found.outcome, found.num_measured, found.num_eligible) == (Outcome.PASS, 3, 4)


def test_no_taps_is_not_measured_with_the_probes_reason():
    unread = replace(after(), second_moments={}, unmeasured={"second_moments": "no forward pass"})
    found = Variance().judge(replace(baseline(), second_moments={}), unread, VarianceLimits())
    assert (found.outcome, found.reason) == (Outcome.NOT_MEASURED, "no forward pass")


def test_silent_baseline_gives_no_ratio():
    found = judge(1.0, then=0.0)
    assert (found.outcome, found.num_measured) == (Outcome.PASS, 3)


def test_wrong_limits_are_errors():
    with pytest.raises(PolicyError, match="gross_band"):
        VarianceLimits(band=1.0, gross_band=0.5)
    with pytest.raises(PolicyError):
        VarianceLimits(band=-1.0)
