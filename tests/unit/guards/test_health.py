"""The health guard: what it makes of a report, and that it says nothing without one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_readings import after, baseline

from weightproof import Action, health, load_policy
from weightproof.errors import PolicyError
from weightproof.guards.health import Health, HealthGuardLimits
from weightproof.judgement.judging import Judged, decide_on, is_asked, judge_all
from weightproof.readings.readings_json import readings_json, readings_of


def judge(limits=None, **numbers):
    found = after("train", health=health.from_numbers(**numbers).reading())
    return Health().judge(baseline(), found, limits or HealthGuardLimits())


@pytest.mark.parametrize(
    ("norms", "outcome"),
    [([1, 2, 3], "PASS"), ([1, 2, 120], "FAIL"), ([1, math.nan], "FAIL"), ([30.0**i for i in range(11)], "WARN")],
)
def test_the_worst_diagnostic_decides(norms, outcome):
    verdict = judge(residual_norms=norms)
    assert verdict.outcome == outcome
    assert len(verdict.measurements) == 8


def test_nothing_measured_is_no_pass():
    assert judge().outcome == "NOT_MEASURED"
    assert Health().judge(baseline(), after("train"), HealthGuardLimits()).outcome == "NOT_MEASURED"


def test_a_failure_names_the_layer():
    assert "h2" in judge(residual_norms=[1, 2, 120]).reason
    assert judge(HealthGuardLimits(rejects=False), residual_norms=[1, 2, 120]).outcome == "WARN"
    with pytest.raises(PolicyError, match="rejects"):
        HealthGuardLimits(rejects="no")


def test_it_speaks_only_where_there_is_a_report_and_then_rejects():
    policy, before, quiet = load_policy("balanced"), baseline(), after("train")
    assert not is_asked(Health(), quiet)
    assert "health" not in judge_all(policy, Judged(before, before, quiet))
    told = replace(quiet, health=health.from_numbers(residual_norms=[1, 2, 120]).reading())
    verdicts = judge_all(policy, Judged(before, before, told))
    assert decide_on(policy, verdicts, kind="train", step=1, world_size=1).action is Action.ROLLBACK


def test_readings_survive_json_and_leave_no_trace_where_there_are_none():
    told = after("train", health=health.from_numbers(residual_norms=[1, 2, 120]).reading())
    assert readings_of(readings_json(told)).health == told.health
    assert "health" not in readings_json(after("train"))
