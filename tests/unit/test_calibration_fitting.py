"""Limits from draws: the promise holds in simulation, roles are fixed beforehand, too few draws are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from weightproof.calibration.conformal import (
    draws_for_rank,
    draws_needed,
    rank_allowed,
    share_supported,
    tolerance_limits,
)
from weightproof.calibration.draws import Draw, Truth
from weightproof.calibration.fitting import LEVEL, SHAPE, fit, role_of, round_up
from weightproof.calibration.targets import DIVISIONS
from weightproof.errors import InputError
from weightproof.policy import TIERS, load_policy

BALANCED = load_policy("balanced")


# ---------------------------------------------------------------- the promise


@pytest.mark.parametrize(
    ("number", "share", "num_scores"), [(59, 0.05, 1), (93, 0.05, 2), (181, 0.05, 5), (299, 0.01, 1)]
)
def test_the_share_beyond_any_limit_is_as_promised_in_simulation(number, share, num_scores):
    """Of 2,000 calibrations at most 5 % (and sampling error) break the promise; scores are as they may be."""
    rank = rank_allowed(number, share)
    ranks = [rank - num_scores + 1, *[1] * (num_scores - 1)]
    random = np.random.default_rng(number * 10 + num_scores)
    broken, repeats = 0, 2000
    for _ in range(repeats):
        scores = random.random((number, num_scores))
        limits = tolerance_limits(scores.tolist(), ranks)
        broken += 1.0 - math.prod(limits) > share  # of independent uniform scores the share is known exactly
    assert broken / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert broken / repeats > 0.005  # and no needless width


@pytest.mark.parametrize("second", [lambda u: u, lambda u: 1.0 - u, lambda u: np.floor(10 * u)])
def test_the_promise_holds_for_scores_that_go_together_exclude_each_other_or_repeat(second):
    number, share, repeats = 93, 0.05, 3000
    random = np.random.default_rng(5)
    grid = (np.arange(2000) + 0.5) / 2000
    broken = 0
    for values in random.random((repeats, number)):
        first, other = tolerance_limits(np.stack([values, second(values)], axis=1).tolist(), (1, 1))
        broken += np.mean((grid > first) | (second(grid) > other)) > share
    assert broken / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_numbers_of_draws_are_those_of_the_theorem():
    assert (draws_needed(0.05), draws_needed(0.01)) == (59, 299)
    assert [draws_for_rank(rank, 0.05) for rank in (1, 2, 5)] == [59, 93, 181]
    assert share_supported(299) < 0.01 < share_supported(298)
    assert rank_allowed(58, 0.05) == 0
    for bad in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="share of false alarms"):
            draws_needed(bad)


def test_limits_are_rounded_up_only():
    for value in (0.041, 0.0411, 1.0, 0.999, 12.3, 3.3e-5):
        rounded = round_up(value)
        assert value <= rounded <= value * 1.1
    assert round_up(0.041) == 0.041


# ---------------------------------------------------------------- fitting


def drawn(
    number: int, *, upper: float = 0.0, lower: float = 0.0, preserving: bool = False, **statistics: float
) -> Draw:
    truth = Truth((upper + lower) / 2, lower, upper)
    return Draw(
        number, "made up", preserving, truth, {key.replace("__", "/"): value for key, value in statistics.items()}
    )


def population(count: int, seed: int = 0) -> list[Draw]:
    """Benign value edits of two families whose statistics are independent."""
    random = np.random.default_rng(seed)
    return [
        drawn(
            number,
            num_matrices=6.0,
            **{f"kappa/{family}": float(random.lognormal(-5, 1)) for family in ("attn", "ffn")},
            **{f"kappa_collapse/{family}": float(random.lognormal(-4, 1)) for family in ("attn", "ffn")},
            **{f"size/{family}": float(random.lognormal(-6, 1)) for family in ("attn", "ffn")},
            **{"spikes_moved/ffn": float(random.integers(0, 9)), "spikes/ffn": 100.0},
            distance=float(random.lognormal(-4, 1)),
            band=float(random.lognormal(-3, 0.5)),
            kl=float(random.lognormal(-6, 1)),
        )
        for number in range(count)
    ]


def breaks(found, draw: Draw) -> bool:
    limits, spectral = found.limits, found.limits["spectral"]
    for family in ("attn", "ffn"):
        if any(draw.statistics[f"{key}/{family}"] > spectral[key][family] for key in ("kappa", "kappa_collapse")):
            return True
    moved, epsilon = 2 * draw.statistics["spikes_moved/ffn"], limits["rmt"]["epsilon"]["ffn"]
    floor = BALANCED.limits["rmt"]["floor"]["default"]
    return (
        moved > max(floor, math.ceil(round(epsilon * draw.statistics["spikes/ffn"], 9)))
        or draw.statistics["distance"] > limits["circuits"]["distance"]
        or draw.statistics["band"] > limits["variance"]["band"]
        or draw.statistics["kl"] > limits["divergence"]["kl"]
    )


@pytest.mark.parametrize(("count", "division"), [(96, 2), (160, 1), (420, 0)])
def test_fitted_limits_keep_their_promise_on_new_edits(count, division):
    new = population(1500, seed=999)
    kept = 0
    for seed in range(20):
        found = fit(population(count, seed), BALANCED, false_alarms=0.05)
        assert found.groups == DIVISIONS[division]
        kept += np.mean([breaks(found, one) for one in new]) <= 0.05
    assert kept >= 17  # 95 % of them, and three standard deviations


def test_shape_and_level_never_see_the_draws_that_judge():
    draws = population(420)
    changed = [
        one if role_of(one.number) in (SHAPE, LEVEL) else drawn(one.number, kl=1e6, distance=1e6) for one in draws
    ]
    first, second = (fit(some, BALANCED, false_alarms=0.05) for some in (draws, changed))
    assert first.limits == second.limits
    flagged = {one.guard: one for one in second.judged}
    assert flagged["any"].flagged == flagged["any"].benign == flagged["divergence"].flagged == 70


def test_the_truth_labels_and_what_it_leaves_open_is_not_used():
    log_tau = math.log(1.05)
    assert drawn(0, upper=0.49 * log_tau).label(1.05) == "benign"
    assert drawn(0, upper=0.51 * log_tau).label(1.05) == "grey"
    assert drawn(0, lower=1.01 * log_tau, upper=9.0).label(1.05) == "harmful"
    assert drawn(0, lower=math.inf, upper=math.inf).label(1.05) == "harmful"
    assert drawn(0, lower=math.nan, upper=math.nan).label(1.05) == "harmful"
    assert drawn(0, lower=9.0, upper=9.0, preserving=True).label(1.05) == "benign"
    draws = population(420)
    grey = [drawn(one.number, lower=0.0, upper=log_tau, kl=1e6) for one in population(60, seed=3)]
    shifted = [Draw(one.number + 420, one.edit, False, one.truth, one.statistics) for one in grey]
    with_grey = fit([*draws, *shifted], BALANCED, false_alarms=0.05)
    assert with_grey.limits == fit(draws, BALANCED, false_alarms=0.05).limits
    assert with_grey.counts["grey"] == 60


def test_edits_that_preserve_the_function_do_not_widen_limits_of_single_matrices():
    draws = population(420)
    wild = {"kappa/attn": 50.0, "kappa_collapse/attn": 50.0, "size/attn": 50.0, "spikes_moved/attn": 99.0, "kl": 1e-9}
    first, second = (
        [Draw(one.number, "neurons permuted", True, None, told) if not one.number % 7 else one for one in draws]
        for told in (wild, {"kl": 1e-9})
    )
    first, second = (fit(some, BALANCED, false_alarms=0.05) for some in (first, second))
    assert first.limits == second.limits


def test_what_a_session_may_leave_open_has_room():
    found = fit(population(420), BALANCED, false_alarms=0.05).limits
    for family in ("attn", "ffn"):
        assert found["spectral"]["kappa_stable_rank"][family] >= 2 * found["spectral"]["kappa"][family]
    # Weyl bounds may leave half of a band open: a count that moved by half of the band passes at the worst end.
    moved = max(one.statistics["spikes_moved/ffn"] for one in population(420))
    assert found["rmt"]["epsilon"]["ffn"] * 100 >= moved
    assert found["spectral"]["null_n"] > 1000
    p_at_the_limit = math.exp(-found["spectral"]["kappa"]["attn"] / found["spectral"]["null_scale"]["attn"])
    assert p_at_the_limit == pytest.approx(1 / found["spectral"]["null_n"], rel=0.6)


def test_every_family_that_the_tier_names_gets_a_limit():
    found = fit(population(420), BALANCED, false_alarms=0.05).limits["rmt"]["epsilon"]
    assert set(BALANCED.limits["rmt"]["epsilon"]) <= set(found)
    assert found["default"] == max(found.values())


def test_too_few_benign_draws_are_refused_with_what_they_would_do_for():
    with pytest.raises(InputError, match=r"too few benign draws: 40 of 60 .* 59 are needed .*--false-alarms 0\.073"):
        fit(population(60), BALANCED, false_alarms=0.05)
    harmful = [drawn(number, lower=1.0, upper=2.0) for number in range(300)]
    with pytest.raises(InputError, match="0 of 300 draws are benign"):
        fit(harmful, BALANCED, false_alarms=0.05)


def test_a_limit_does_not_pass_the_gross_one():
    wild = [
        Draw(one.number, one.edit, False, one.truth, {**one.statistics, "kappa_collapse/attn": math.inf, "band": 99.0})
        for one in population(420)
    ]
    found = fit(wild, BALANCED, false_alarms=0.05).limits
    assert found["variance"]["band"] == BALANCED.limits["variance"]["gross_band"]
    assert found["spectral"]["kappa_collapse"]["attn"] == 2.303


# ---------------------------------------------------------------- the shipped tiers


@pytest.mark.parametrize("tier", TIERS)
def test_the_shipped_tiers_are_what_their_draws_give(tier):
    content = json.loads((Path(__file__).parents[2] / "benchmarks" / "detection" / "calibration.json").read_text())
    names, draws = content["draws"]["columns"][7:], []
    for model, number, edit, preserving, delta, lower, upper, *values in content["draws"]["rows"]:
        statistics = {name: float(value) for name, value in zip(names, values, strict=True) if value is not None}
        truth = Truth(float(delta), float(lower), float(upper))
        draws.append(Draw(number, edit, bool(preserving), truth, statistics, model))
    policy = load_policy(tier)
    found = fit(draws, policy, false_alarms=content["fits"][tier]["false_alarms"])
    for guard, keys in found.limits.items():
        for key, value in keys.items():
            assert policy.limits[guard][key] == value
            assert "calibration.md" in policy.sources[f"limits.{guard}.{key}"]
            assert f"limits.{guard}.{key}" not in policy.provisional
    assert f"{found.num_level} benign draws" in policy.sources["limits.divergence.kl"]
