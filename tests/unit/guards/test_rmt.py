from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_readings import NONFINITE, after, baseline, bulk, with_bulk

from weightproof.errors import PolicyError
from weightproof.guards.rmt import RMT, RMTLimits
from weightproof.types import Outcome, Readings

NAME = "blocks.0.mlp.up"


def judge(readings: Readings, before: Readings | None = None, **limits: object):
    return RMT().judge(before or baseline(), readings, RMTLimits(**limits))  # type: ignore[arg-type]


def families(**spikes: int) -> dict[str, object]:
    return {"bulks": {f"{family}.0": bulk(f"{family}.0", family, count) for family, count in spikes.items()}}


@pytest.mark.parametrize(
    ("kind", "spikes", "outcome"),
    [
        ("quantize", 10, "PASS"),
        ("quantize", 3, "PASS"),
        ("quantize", 2, "WARN"),
        ("quantize", 17, "PASS"),
        ("quantize", 18, "WARN"),
        ("prune", 18, "WARN"),
        ("cast", 18, "WARN"),
        ("preserving", 18, "WARN"),
        ("unknown", 2, "WARN"),
        ("unknown", 40, "PASS"),
        ("lora_merge", 40, "PASS"),
        ("train", 40, "PASS"),
        ("train", 0, "PASS"),
        ("unknown", 0, "WARN"),
    ],
)
def test_family_count_is_judged_within_its_band_by_declared_kind(kind, spikes, outcome):
    # The family ffn holds 20 outliers before: its band is max(2, ceil(.31 * 20)) = 7.
    assert judge(with_bulk(after(kind), NAME, num_spikes=spikes)).outcome == outcome


def test_fact_9_both_families_beyond_a_band_of_one():
    before, now = (
        replace(baseline(), **families(ffn=10, attn=5)),
        replace(after("quantize"), **families(ffn=12, attn=6)),
    )
    found = judge(now, before, epsilon=0.10, floor=0)
    assert found.outcome is Outcome.WARN
    assert "family ffn: num_spikes_gained = 2 (limit 1)" in found.reason


def test_ratio_alone_does_not_rule_small_counts():
    before, now = replace(baseline(), **families(ffn=1)), replace(after("quantize"), **families(ffn=2))
    assert judge(now, before, floor=0, epsilon=0.1).outcome is Outcome.PASS
    assert RMTLimits(epsilon=0.1, floor=0).band("ffn", 0) == 0
    assert RMTLimits(epsilon=0.1, floor=2).band("ffn", 0) == 2


@pytest.mark.parametrize(("count", "band"), [(10, 1), (11, 2), (20, 2), (21, 3), (30, 3), (0, 0)])
def test_band_is_the_rounded_up_share(count, band):
    assert RMTLimits(epsilon=0.1, floor=0).band("ffn", count) == band


def test_interval_of_counts_is_judged_at_its_worst_end():
    readings = with_bulk(after("quantize"), NAME, num_spikes=10, num_spikes_low=2, num_spikes_high=10)
    found = judge(readings)
    assert found.outcome is Outcome.WARN
    assert "counted as an interval" in found.reason
    assert judge(with_bulk(after("quantize"), NAME, num_spikes=10, num_spikes_low=3)).outcome is Outcome.PASS


def test_matrix_that_lost_all_its_outliers_warns_whatever_the_family_sum():
    readings = with_bulk(with_bulk(after(), NAME, num_spikes=0), "blocks.1.mlp.up", num_spikes=20)
    found = judge(readings)
    assert found.outcome is Outcome.WARN
    assert "all 10 outliers are gone" in found.reason


@pytest.mark.parametrize(
    ("kind", "ratio", "outcome"),
    [
        ("quantize", 1.6, "PASS"),
        ("quantize", 1.7, "WARN"),
        ("unknown", 1.7, "PASS"),
        ("unknown", 1 / 1.7, "WARN"),
        ("train", 1 / 1.7, "PASS"),
        ("quantize", 0.0, "WARN"),
    ],
)
def test_growth_ratio_beyond_margin_and_deadband(kind, ratio, outcome):
    assert judge(with_bulk(after(kind), NAME, top_over_edge=2.0 * ratio)).outcome == outcome


@pytest.mark.parametrize("value", NONFINITE)
def test_statistic_that_is_not_finite_fails(value):
    assert judge(with_bulk(after("train"), NAME, edge_plus=value)).outcome is Outcome.FAIL


def test_readings_under_different_nulls_are_never_compared():
    found = judge(with_bulk(after("quantize"), NAME, null="biwhitened", num_spikes=0))
    assert found.outcome is Outcome.PASS
    assert (found.num_measured, found.num_eligible) == (4, 5)


def test_no_fit_at_all_is_not_measured():
    nothing = dict.fromkeys(("num_spikes", "num_spikes_low", "num_spikes_high"))
    refused = {NAME: replace(bulk(NAME, "ffn"), reason="too small to fit", **nothing)}
    found = judge(replace(after(), bulks=refused), replace(baseline(), bulks=refused))
    assert found.outcome is Outcome.NOT_MEASURED
    lost = judge(replace(after(), bulks={**baseline().bulks, **refused}))
    assert lost.outcome is Outcome.WARN
    assert "too small to fit" in lost.reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": -0.1},
        {"epsilon": "x"},
        {"epsilon": {"default": math.inf}},
        {"deadband": -0.1},
        {"deadband": 1.1},
        {"margin": 0.9},
        {"min_vanished": 0},
        {"correct": "scal"},
    ],
)
def test_wrong_limit_is_an_error(wrong):
    with pytest.raises(PolicyError):
        RMTLimits(**wrong)


def test_growth_within_the_deadband_is_quiet_up_to_its_edge():
    for ratio, outcome in ((1.05, "PASS"), (1.08, "PASS"), (1.10, "PASS"), (1.2, "WARN")):
        readings = with_bulk(after("quantize"), NAME, top_over_edge=2.0 * ratio)
        assert judge(readings, deadband=0.10, margin=1.0).outcome == outcome


def test_epsilon_on_one_family_leaves_the_others_alone():
    readings = with_bulk(after("quantize"), "embed", num_spikes=4)
    assert judge(readings, epsilon={"default": 0.1, "ffn": 9.0}).outcome is Outcome.WARN
