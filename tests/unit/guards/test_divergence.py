from __future__ import annotations

from dataclasses import replace

import pytest
from hand_readings import NONFINITE, after, baseline, outputs

from weightproof.errors import PolicyError
from weightproof.guards.divergence import Divergence, DivergenceLimits
from weightproof.types import BlockError, DivergenceReading, Outcome


def judge(*readings: DivergenceReading, kind: str = "unknown", before: tuple[DivergenceReading, ...] = ()):
    return Divergence().judge(
        replace(baseline(), divergence=before), replace(after(kind), divergence=readings), DivergenceLimits()
    )


@pytest.mark.parametrize(
    ("kl", "outcome"),
    [
        (0.0, "PASS"),
        (-1e-9, "PASS"),
        (0.0004, "PASS"),
        (0.0205, "PASS"),
        (0.0206, "WARN"),
        (0.041, "WARN"),
        (0.042, "FAIL"),
        (0.057, "FAIL"),
    ],
)
def test_divergence_beyond_the_limit_fails_and_beyond_half_of_it_warns(kl, outcome):
    assert judge(outputs(kl)).outcome == outcome


@pytest.mark.parametrize(("error", "outcome"), [(0.075, "PASS"), (0.08, "WARN"), (0.15, "WARN"), (0.16, "FAIL")])
def test_models_without_logits_are_judged_by_their_hidden_state(error, outcome):
    assert judge(outputs(None, hidden_error=error)).outcome == outcome


def test_the_worst_set_of_windows_decides_and_is_named():
    found = judge(outputs(0.001), outputs(0.3, windows="calibration"))
    assert found.outcome is Outcome.FAIL
    assert "calibration windows: kl = 0.3 (limit 0.041)" in found.reason


@pytest.mark.parametrize("kind", ["unknown", "train"])
@pytest.mark.parametrize("value", NONFINITE)
def test_outputs_that_are_not_finite_fail_in_training_too(kind, value):
    assert judge(outputs(0.0, finite=False), kind=kind).outcome is Outcome.FAIL
    assert judge(outputs(value), kind=kind).outcome is Outcome.FAIL


def test_outputs_may_move_in_training():
    found = judge(outputs(3.0), kind="train")
    assert found.outcome is Outcome.PASS
    assert all(item.limit is None for item in found.measurements)


def test_flip_rate_is_reported_not_judged():
    flips = [item for item in judge(outputs(0.001)).measurements if item.statistic == "top1_flip_rate"]
    assert [(item.value, item.limit) for item in flips] == [(0.01, None)]


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (None, None),
        (outputs(0.0), outputs(0.0, windows_digest="other text")),
        (outputs(0.0), outputs(0.0, windows="calibration")),
        (outputs(0.0), outputs(0.0, finite=False)),
        (outputs(0.0, num_tokens=0), None),
        (outputs(None), None),
    ],
    ids=["no windows", "other digest", "other windows", "broken baseline", "no tokens", "no logits, no state"],
)
def test_outputs_that_cannot_be_paired_are_not_measured(now, before):
    found = judge(*([now] if now else []), before=(before,) if before else ())
    assert found.outcome is Outcome.NOT_MEASURED
    assert found.reason


def test_failure_names_first_and_worst_block():
    blocks = tuple(BlockError(f"blocks.{i}", error) for i, error in enumerate((1e-6, 0.2, 0.05, 0.9)))
    found = judge(outputs(0.3, blocks=blocks))
    assert "worst block blocks.3 (relative error 0.9), first damaged block blocks.1" in found.reason
    assert "block" not in judge(outputs(0.001, blocks=blocks)).reason


@pytest.mark.parametrize("wrong", [{"kl": -0.01}, {"warn_fraction": 1.5}, {"hidden_error": None}])
def test_wrong_limit_is_an_error(wrong):
    with pytest.raises(PolicyError):
        DivergenceLimits(**wrong)
