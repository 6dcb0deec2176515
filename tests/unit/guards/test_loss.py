from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hand_readings import after, baseline

from weightproof.errors import InputError, PolicyError
from weightproof.guards.loss import Loss, LossLimits, harm
from weightproof.policy import TIERS, load_policy
from weightproof.statistics.paired import PairedSums, interval
from weightproof.types import LossReading, Outcome, Verdict

LIMITS = LossLimits()


def reading(lower: float | None, upper: float | None, **changes: Any) -> LossReading:
    """A reading of 200 windows of 128 tokens with this interval."""
    point = None if lower is None or upper is None else (lower + upper) / 2
    plain = LossReading(
        role="retain",
        windows_digest="digest",
        metric="nll",
        num_windows=200,
        num_groups=200,
        num_tokens=200 * 128,
        num_used=200,
        tokens_used=200 * 128,
        before=3.0,
        after=3.0 + (point or 0.0),
        difference=point,
        lower=lower,
        upper=upper,
        confidence=0.95,
        effective_size=200.0,
        method="bca",
        sums={"before": 3.0 * 25_600, "after": 3.0 * 25_600, "weight": 25_600.0, "higher_is_better": 0.0},
    )
    return replace(plain, **changes)


def accuracy(lower: float, upper: float, **changes: Any) -> LossReading:
    sums = {"before": 180.0, "after": 180.0, "weight": 200.0, "higher_is_better": 1.0}
    return reading(lower, upper, metric="accuracy", num_tokens=200, tokens_used=200, sums=sums, **changes)


def judge(*readings: LossReading, limits: LossLimits = LIMITS) -> Verdict:
    return Loss().judge(baseline(), replace(after(), losses=readings), limits)


LOG_TAU = math.log(1.05)


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (-0.01, 0.01, "PASS"),
        (0.0, 0.0, "PASS"),
        (-0.3, -0.2, "PASS"),
        (0.0, LOG_TAU, "PASS"),
        (0.0, 0.06, "WARN"),
        (LOG_TAU, 0.06, "WARN"),
        (0.05, 0.06, "FAIL"),
        (1.0, math.inf, "WARN"),
        (None, None, "WARN"),
    ],
)
def test_retain_is_decided_by_the_interval(lower, upper, expected):
    found = judge(reading(lower, upper, after=3.0))
    assert found.outcome == expected
    assert "retain nll" in found.reason


def test_the_point_decides_nothing():
    for point in (-5.0, 0.0, 5.0):
        for lower, upper in ((-0.01, 0.01), (0.0, 0.06), (0.05, 0.06)):
            with_point = reading(lower, upper, difference=point, after=3.0 + point)
            assert judge(with_point).outcome is judge(reading(lower, upper)).outcome


def test_a_worse_interval_never_gets_a_better_verdict():
    order = [Outcome.PASS, Outcome.WARN, Outcome.FAIL]
    for role in ("retain", "target"):
        for width in (0.0, 0.01, 0.2):
            ends = [(x, x + width) for x in np.linspace(-0.5, 0.5, 101).tolist()]
            verdicts = [judge(GOOD, reading(*both, role=role)).outcome for both in ends]
            ranks = [order.index(outcome) for outcome in verdicts]
            assert ranks == sorted(ranks)
            assert {verdicts[0], verdicts[-1]} == {Outcome.PASS, Outcome.FAIL}


# Facts 26 and 27: the one-sided gate of a promised gain; e is the gain asked.
@pytest.mark.parametrize(
    ("lower", "upper", "gain", "expected"),
    [
        (-0.2, -0.05, 0.01, "PASS"),
        (0.05, 0.2, 0.01, "FAIL"),
        (-0.002, -0.0001, 0.01, "FAIL"),
        (0.0, 0.1, 0.0, "FAIL"),
        (None, None, 0.0, "WARN"),
        (-0.2, 0.0, 0.0, "WARN"),
        (0.015, 0.03, 0.01, "FAIL"),
        (0.005, 0.02, 0.01, "FAIL"),
        (-0.4, -0.1, 0.01, "PASS"),
        (0.0, 0.0, 0.0, "FAIL"),
        (-0.1, -1e-6, 0.0, "PASS"),
        (-0.1, 0.1, 0.0, "WARN"),
    ],
)
def test_target_must_show_a_gain(lower, upper, gain, expected):
    found = judge(GOOD, reading(lower, upper, role="target"), limits=LossLimits(min_gain=gain))
    assert found.outcome == expected
    assert found.outcome is not Outcome.PASS or upper < 0


# Fact 28: a perplexity of 100 -> 90 whose ratio may be 1.01, no interval, too small an effect.
@pytest.mark.parametrize(
    ("low", "high", "gain", "expected"),
    [(0.9, 1.01, 0.0, "WARN"), (0.75, 0.83, 0.2, "WARN"), (0.75, 0.8187, 0.2, "PASS"), (0.9996, 0.9998, 0.05, "FAIL")],
)
def test_ratios_of_perplexities(low, high, gain, expected):
    found = judge(GOOD, reading(math.log(low), math.log(high), role="target"), limits=LossLimits(min_gain=gain))
    assert found.outcome == expected


# Fact 39: 40 -> 44 passes a limit of 1.10, 40 -> 46 fails. Here the interval must say so.
@pytest.mark.parametrize(("now", "expected"), [(44.0, "PASS"), (46.0, "FAIL")])
def test_perplexity_of_forty(now, expected):
    rng = np.random.default_rng(0)
    weights = rng.integers(100, 128, 180).astype(float)
    before = weights * math.log(40.0)
    found = interval(PairedSums(before, weights * math.log(now), weights))
    limits = load_policy("aggressive").limits_for(Loss)
    assert judge(reading(found.lower, found.upper), limits=limits).outcome == expected


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [(-0.005, 0.02, "PASS"), (0.1, 0.2, "PASS"), (-0.02, 0.01, "WARN"), (-0.1, -0.02, "FAIL")],
)
def test_accuracy_may_drop_by_so_much(lower, upper, expected):
    assert judge(accuracy(lower, upper)).outcome == expected
    gained = judge(GOOD, accuracy(-upper, -lower, role="target"), limits=LossLimits(min_gain=0.01)).outcome
    assert gained is not Outcome.PASS or -upper > 0


def test_limits_of_metrics_by_name():
    limits = LossLimits(metric_drop={"default": 0.01, "accuracy": 0.2})
    assert limits.outcome(accuracy(-0.15, -0.1)) is Outcome.PASS
    assert limits.outcome(replace(accuracy(-0.15, -0.1), metric="hits")) is Outcome.FAIL
    assert harm(accuracy(-0.15, -0.1)) == (0.1, 0.15)


GOOD, BAD, OPEN = reading(-0.01, 0.01), reading(0.2, 0.3), reading(0.0, 0.2)
GAIN, NO_GAIN = (replace(one, role="target") for one in (reading(-0.3, -0.2), reading(0.1, 0.2)))
UNREAD = replace(reading(None, None, before=None, after=None), role="target", reason="the loss before is NaN")


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ((GOOD, GAIN), "PASS"),
        ((GAIN,), "WARN"),
        ((NO_GAIN,), "FAIL"),
        ((GOOD, NO_GAIN), "FAIL"),
        ((BAD, GAIN), "FAIL"),
        ((BAD, UNREAD), "FAIL"),
        ((OPEN, GAIN), "WARN"),
        ((OPEN, NO_GAIN), "FAIL"),
        ((GOOD, UNREAD), "WARN"),
        ((UNREAD,), "NOT_MEASURED"),
        ((), "NOT_MEASURED"),
    ],
)
def test_any_rejects_and_only_all_accept(readings, expected):
    found = judge(*readings)
    assert found.outcome == expected
    assert (found.num_measured, found.num_eligible) == (sum(r is not UNREAD for r in readings), len(readings))
    assert found.reason
    if UNREAD in readings and BAD not in readings:
        assert "target nll was not measured: the loss before is NaN" in found.reason
    if readings == (GAIN,):
        assert "no retain data" in found.reason
    if NO_GAIN in readings:
        assert "target nll rejects" in found.reason


# Facts 30, 35 and 37: what is missing, empty or too little is no verdict; fewer windows than the floor are not judged.
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_windows": 99}, "99 windows of at least 100"),
        ({"num_tokens": 4000}, "4000 scored tokens of at least 4096"),
        ({"reason": "the loss before the change is NaN"}, "the loss before the change is NaN"),
        ({"before": math.nan}, "the loss before the change is nan"),
        ({"before": None}, "the loss before the change is None"),
    ],
)
def test_below_the_floor_nothing_is_decided(changes, why):
    for one in (GOOD, BAD):
        found = judge(replace(one, **changes))
        assert found.outcome is Outcome.NOT_MEASURED
        assert why in found.reason
        assert found.num_measured == 0


def test_scores_an_example_have_no_floor_in_tokens():
    assert judge(accuracy(0.0, 0.0)).outcome is Outcome.PASS


def test_no_loss_data_is_not_measured_with_the_probes_reason():
    unread = replace(after(), unmeasured={"losses": "no retain data were given"})
    assert Loss().judge(baseline(), unread, LIMITS).reason == "no retain data were given"


@pytest.mark.parametrize("now", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["retain", "target"])
def test_a_loss_that_is_not_finite_any_more_is_rejected(now, role):
    broken = reading(None, None, after=now, difference=now, role=role, method="the model no longer runs: out of range")
    found = judge(broken)
    assert found.outcome is Outcome.FAIL
    assert str(now) in found.reason
    assert "the model no longer runs: out of range" in found.reason


def test_an_interval_that_cannot_be_trusted_decides_nothing():
    for one in (GOOD, BAD):
        found = judge(replace(one, undecided="effective sample too small: 4.8 of at least 12"))
        assert found.outcome is Outcome.WARN
        assert "effective sample too small: 4.8 of at least 12" in found.reason


def test_undecided_says_how_many_windows_more_might_decide():
    found = judge(reading(LOG_TAU - 0.03, LOG_TAU + 0.01))  # half width .02, gap .01: four times the windows
    assert found.outcome is Outcome.WARN
    assert "[0.01879, 0.05879]" in found.reason
    assert "at most 0.04879 is allowed" in found.reason
    assert "about 600 windows more might decide" in found.reason
    assert "hardly decide" in judge(reading(LOG_TAU - 0.01, LOG_TAU + 0.01)).reason


def test_measurements_carry_the_deciding_end_and_report_the_rest():
    judged, difference, mean = judge(BAD).measurements
    assert (judged.statistic, judged.value, judged.limit, judged.outcome) == ("harm_lower_bound", 0.2, LOG_TAU, "FAIL")
    assert (difference.limit, mean.limit) == (None, None)
    assert (mean.value, mean.reference) == (3.25, 3.0)
    judged = judge(GOOD).measurements[0]
    assert (judged.statistic, judged.value, judged.outcome) == ("harm_upper_bound", 0.01, "PASS")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tau", 0.9),
        ("tau", math.nan),
        ("tau", "1.05"),
        ("min_gain", -0.1),
        ("alpha", 0.0),
        ("alpha", 1.5),
        ("min_windows", 0),
        ("min_windows", 2.5),
        ("min_tokens", -1),
        ("min_effective_size", 1.0),
        ("max_windows", 10),
        ("length", 0),
        ("metric_drop", {"accuracy": 0.1}),
        ("metric_drop", {"default": -0.1}),
    ],
)
def test_wrong_limits_are_errors(key, value):
    with pytest.raises(PolicyError, match=key):
        LossLimits(**{key: value})


def test_tiers_hold_the_limits_of_the_guard():
    found = {tier: load_policy(tier).limits_for(Loss) for tier in TIERS}
    assert [found[tier].tau for tier in TIERS] == [1.01, 1.05, 1.10]
    assert found["balanced"] == LossLimits()
    for tier in TIERS:
        sources = load_policy(tier).sources
        assert all(sources[f"limits.loss.{key}"] not in ("", "user") for key in load_policy(tier).limits["loss"])
    strict, plain, loose = (found[tier] for tier in TIERS)
    for key in ("min_windows", "min_tokens", "max_windows"):
        assert getattr(strict, key) > getattr(plain, key) > getattr(loose, key)


# Facts 33 and 34: no edit is a ratio of exactly 1, equal arrays an interval of (0, 0).
def test_no_change_is_accepted_and_unusable_samples_are_errors():
    weights = np.arange(1.0, 61.0)
    found = interval(PairedSums(weights, weights, weights))
    assert (found.estimate, found.lower, found.upper) == (0.0, 0.0, 0.0)
    assert judge(reading(found.lower, found.upper)).outcome is Outcome.PASS
    with pytest.raises(InputError):
        PairedSums([math.nan], [1.0], [1.0])
