from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_readings import NONFINITE, after, baseline, matrix, unread_matrix, with_matrix

from weightproof.errors import PolicyError
from weightproof.guards.spectral import Spectral, SpectralLimits
from weightproof.types import Outcome, Readings

NAME = "blocks.0.mlp.up"


def judge(readings: Readings, before: Readings | None = None, **limits: object):
    return Spectral().judge(before or baseline(), readings, SpectralLimits(**limits))  # type: ignore[arg-type]


def changed(**changes: object) -> Readings:
    return with_matrix(after(), NAME, **changes)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "PASS"),
        ({"spectral_norm": 2.0 * 1.0006}, "PASS"),
        ({"spectral_norm": 2.0 * 1.09, "frobenius_norm": 10.0 * 1.09}, "PASS"),
        ({"spectral_norm": 2.0 * 1.2, "frobenius_norm": 10.0 * 1.2}, "WARN"),
        ({"spectral_norm": 2.0 / 1.2, "frobenius_norm": 10.0 / 1.2}, "WARN"),
        ({"spectral_norm": 2000.0, "frobenius_norm": 10000.0}, "FAIL"),
        ({"spectral_norm": 0.002, "frobenius_norm": 0.01}, "FAIL"),
        ({"frobenius_norm": 2.0}, "FAIL"),
        ({"frobenius_norm": 10.0 * math.sqrt(0.5)}, "WARN"),
        ({"norm_collapse": 0.04}, "FAIL"),
        ({"norm_collapse": 0.2}, "WARN"),
        ({"norm_collapse": 0.0}, "FAIL"),
        ({"zero_rows": 1}, "WARN"),
        ({"zero_cols": 3}, "WARN"),
        ({"spectral_norm": 0.0, "frobenius_norm": 0.0, "norm_collapse": None, "zero_rows": 64}, "FAIL"),
    ],
    ids=[
        "same",
        "int8-like",
        "within kappa",
        "grown",
        "shrunk",
        "x1000",
        "/1000",
        "rank one",
        "stable rank halved",
        "collapsed",
        "uneven",
        "row of zeros",
        "new zero row",
        "new zero columns",
        "all zero",
    ],
)
def test_change_of_one_matrix_is_judged_two_sided_against_its_own_baseline(changes, outcome):
    found = judge(changed(**changes))
    assert found.outcome == outcome
    if outcome != "PASS":
        assert NAME in found.reason
    assert (found.num_measured, found.num_eligible) == (5, 5)


def test_reason_names_the_worst_matrix_with_value_and_limit():
    readings = with_matrix(changed(spectral_norm=3.0), "blocks.1.attn.q", spectral_norm=50.0, frobenius_norm=250.0)
    found = judge(readings)
    assert found.outcome is Outcome.FAIL
    assert found.reason.startswith("blocks.1.attn.q: log_spectral_norm_ratio = 3.219 (limit 2.303)")
    assert "\n" not in found.reason


def test_a_spread_of_norms_between_layers_is_no_deviation():
    wide = {"spectral_norm": 80.0, "frobenius_norm": 400.0}
    assert judge(changed(**wide), with_matrix(baseline(), NAME, **wide)).outcome is Outcome.PASS


@pytest.mark.parametrize("value", NONFINITE)
def test_statistic_that_is_not_finite_fails(value):
    assert judge(changed(spectral_norm=value)).outcome is Outcome.FAIL
    assert judge(changed(spectral_norm_error=value)).outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("error", "outcome"), [(0.1, "PASS"), (0.3, "WARN"), (1.5, "WARN"), (1.9, "FAIL"), (2.5, "FAIL")]
)
def test_statistic_known_as_an_interval_is_judged_at_its_worst_end(error, outcome):
    # Look at the top singular value alone; a Frobenius norm of 10 proves at least 10 / sqrt(1000).
    wide = {"d_out": 1000, "d_in": 1000, "spectral_norm_error": error}
    found = judge(changed(**wide), kappa_stable_rank=99.0, gross_stable_rank=0.0, gross_growth=6.0)
    assert found.outcome == outcome
    if outcome != "PASS":
        assert "judged at its worst end" in found.reason


def test_interval_ends_at_what_the_frobenius_norm_proves():
    # 32 singular values with a sum of squares of 100: s1 lies in [1.77, 10] whatever its error.
    found = judge(changed(spectral_norm_error=1e6), kappa_stable_rank=99.0, gross_stable_rank=0.0)
    assert found.outcome is Outcome.WARN
    assert f"[{math.log(10 / 32**0.5 / 2):.4g}, {math.log(10 / 2):.4g}]" in found.reason


def test_interval_that_is_proven_beyond_the_limit_needs_no_remark():
    found = judge(changed(spectral_norm=4.0, frobenius_norm=20.0, spectral_norm_error=0.2))
    assert found.outcome is Outcome.WARN
    assert "worst end" not in found.reason


def test_matrix_without_reading_is_counted_and_never_silently_passed():
    lost = replace(baseline(), matrices={name: reading for name, reading in after().matrices.items() if name != NAME})
    lost = replace(lost, edit=after().edit)
    found = judge(lost)
    assert (found.num_measured, found.num_eligible) == (4, 5)
    gap = next(item for item in found.measurements if item.target == NAME)
    assert gap.outcome is Outcome.NOT_MEASURED
    assert gap.value is None
    assert gap.reason


def test_matrix_that_can_no_longer_be_read_warns():
    readings = after()
    matrices = {**readings.matrices, NAME: unread_matrix(NAME, "ffn", "3 values are NaN or inf")}
    found = judge(replace(readings, matrices=matrices))
    assert found.outcome is Outcome.WARN
    assert "3 values are NaN" in found.reason


def test_refused_in_both_is_not_measured():
    refused = {name: unread_matrix(name, "other", "packed") for name in ("a", "b")}
    found = judge(replace(after(), matrices=refused), replace(baseline(), matrices=refused))
    assert found.outcome is Outcome.NOT_MEASURED
    assert (found.num_measured, found.num_eligible) == (0, 2)


def test_empty_scope_is_not_measured_with_the_probes_reason():
    empty = replace(after(), matrices={}, unmeasured={"matrices": "the model has no weight matrix"})
    found = judge(empty, replace(baseline(), matrices={}))
    assert found.outcome is Outcome.NOT_MEASURED
    assert found.reason == "the model has no weight matrix"


def test_matrix_that_was_zero_has_no_ratio_and_warns_when_it_fills():
    zero = {"spectral_norm": 0.0, "frobenius_norm": 0.0, "norm_collapse": None}
    before = with_matrix(baseline(), NAME, **zero)
    assert judge(changed(**zero), before).outcome is Outcome.PASS
    assert judge(changed(), before).outcome is Outcome.WARN


def test_false_discovery_rate_counts_every_matrix_not_only_suspicious_ones():
    # p = exp(-.3 / .1) = .0498: alone in the scope it is rejected at .05, among 15 tests it is not.
    wide = {"null_scale": 0.1, "null_scale_stable_rank": 0.1, "null_scale_collapse": 0.1}
    grown = {"spectral_norm": 2 * math.exp(0.3), "frobenius_norm": 10 * math.exp(0.3), "norm_collapse": None}
    alone = {NAME: matrix(NAME, "ffn", spectral_norm_error=0.0, norm_collapse=None)}
    before = replace(baseline(), matrices=alone)
    now = replace(after(), matrices={NAME: replace(alone[NAME], **grown)})
    assert judge(now, before, alpha=0.1, **wide).outcome is Outcome.WARN
    crowded = with_matrix(after(), NAME, **grown)
    found = judge(crowded, alpha=0.1, **wide)
    assert found.outcome is Outcome.PASS
    unrejected = [item for item in found.measurements if item.target == NAME and item.statistic.endswith("norm_ratio")]
    assert "not rejected" in (unrejected[0].reason or "")


class TestTraining:
    """A window of training: only gross growth of trained matrices counts."""

    def window(self, **changes: object) -> Readings:
        spectral = {key: changes.pop(key) for key in list(changes) if key in matrix("x", "ffn").__slots__}
        return replace(with_matrix(after("train"), NAME, **spectral), **changes)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changes", "outcome"),
        [
            ({"spectral_norm": 8.0, "frobenius_norm": 12.0}, "PASS"),
            ({"spectral_norm": 0.1, "frobenius_norm": 0.5}, "PASS"),
            ({"frobenius_norm": 2.0}, "PASS"),
            ({"norm_collapse": 0.001, "zero_rows": 5}, "PASS"),
            ({"spectral_norm": 25.0, "frobenius_norm": 30.0}, "FAIL"),
            ({"spectral_norm": 25.0, "frobenius_norm": 30.0, "untrained": frozenset({NAME})}, "PASS"),
            ({"spectral_norm": 25.0, "frobenius_norm": 30.0, "in_warmup": True}, "PASS"),
            ({"spectral_norm": 25.0, "frobenius_norm": 30.0, "in_warmup": True, "loss_spike": True}, "FAIL"),
            (
                {"spectral_norm": 25.0, "frobenius_norm": 30.0, "untrained": frozenset({NAME}), "loss_spike": True},
                "FAIL",
            ),
            ({"spectral_norm": 25.0, "in_warmup": True, "raw_losses": (2.0, math.nan)}, "FAIL"),
            ({"spectral_norm": 0.0, "frobenius_norm": 0.0}, "FAIL"),
            ({"spectral_norm": 0.0, "frobenius_norm": 0.0, "untrained": frozenset({NAME})}, "PASS"),
            ({"spectral_norm": math.nan}, "FAIL"),
        ],
    )
    def test_only_gross_growth_counts(self, changes, outcome):
        assert judge(self.window(**changes)).outcome == outcome

    def test_everything_else_is_reported_without_limit(self):
        found = judge(self.window(frobenius_norm=2.0))
        stable = [item for item in found.measurements if item.statistic == "log_stable_rank_ratio"]
        assert all(item.limit is None for item in stable)
        assert min(item.value or 0.0 for item in stable) < -3

    def test_growth_from_a_zero_matrix_is_healthy(self):
        before = with_matrix(baseline(), NAME, spectral_norm=0.0, frobenius_norm=0.0, norm_collapse=None)
        assert judge(self.window(), before).outcome is Outcome.PASS


@pytest.mark.parametrize(
    "wrong",
    [
        {"kappa": -0.1},
        {"kappa": math.nan},
        {"kappa": "x"},
        {"kappa": {"ffn": 0.1}},
        {"kappa": {"default": 0.1, "fnn": 0.1}},
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"null_scale": 0.0},
        {"null_n": 2.5},
        {"gross_growth": 1.0},
        {"gross_collapse": 2.0},
        {"max_new_zero_rows": True},
        {"correct": "magic"},
        {"null_form": "gaussian"},
    ],
)
def test_wrong_limit_is_an_error(wrong):
    with pytest.raises(PolicyError):
        SpectralLimits(**wrong)


def test_family_limits_are_independent():
    grown = changed(spectral_norm=2.4, frobenius_norm=12.0)
    assert judge(grown, kappa={"default": 0.1, "attn": 5.0}).outcome is Outcome.WARN
    assert judge(grown, kappa={"default": 0.1, "ffn": 5.0}).outcome is Outcome.PASS
