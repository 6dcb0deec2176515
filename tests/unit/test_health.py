"""Training health on plain numbers: formulas, statuses, and what the first version of the report got wrong."""

import json
import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from weightproof import health
from weightproof.diagnostics.numerics import jackknife, pairwise_cosine, unit_rows
from weightproof.errors import InputError

NAN = math.nan


def statuses(report):
    return {name: str(one.status) for name, one in report.diagnostics.items()}


# ---- formulas -------------------------------------------------------------------------------------------------------


def test_growth_by_hand():
    assert health.block_growth([1, 2, 60, 66]) == pytest.approx([2, 30, 1.1])
    assert health.block_growth(torch.tensor([1.0, 2.0, 120.0])) == [2, 60]
    assert health.total_growth([1, 2, 60, 66]) == 66


def test_growth_of_what_is_no_norm():
    ratios = health.block_growth([0.0, 0.0, 1.0, NAN])
    assert math.isnan(ratios[0])
    assert ratios[1] == math.inf
    assert math.isnan(ratios[2])
    for wrong in ([], [1.0], [1.0, -1.0]):
        with pytest.raises(InputError, match="norms"):
            health.block_growth(wrong)


def test_stability_by_hand():
    directions = torch.tensor([[1, 0], [0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    assert health.stability(directions) == pytest.approx(1.4 / 3)
    total = directions.sum(dim=0)
    assert float(total.dot(total)) == pytest.approx(5.80)
    assert pairwise_cosine(total, 3) == pytest.approx(0.46667, abs=1e-5)
    assert float((directions.mean(dim=0) ** 2).sum()) == pytest.approx(0.6444, abs=1e-4)  # another number: not ours


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_stability_is_not_clamped(scale):
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    slow = [float(a @ b / a.norm() / b.norm()) for i, a in enumerate(rows) for b in rows[:i]]
    assert health.stability(rows * scale) == pytest.approx(sum(slow) / len(slow), rel=1e-9)
    assert health.stability(torch.ones(2, 3, dtype=torch.float64) * scale) == pytest.approx(1.0)


def test_stability_leaves_zero_gradients_out_and_shows_nan():
    assert health.stability([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]) == pytest.approx(1.0)
    assert math.isnan(health.stability([[1.0, 0.0], [NAN, 0.0]]))
    with pytest.raises(InputError, match="1 of 2 directions"):
        health.stability([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(InputError, match="shape"):
        health.stability(torch.ones(3))


def test_agreement_of_batches_from_that_of_samples():
    converted = [health.batch_stability(0.0033, rows) for rows in (8, 32, 128, 512)]
    assert converted == pytest.approx([0.03, 0.10, 0.30, 0.63], abs=0.005)
    assert health.batch_stability(0.0033, 1) == pytest.approx(0.0033)
    for rows in (2, 128):
        assert health.batch_stability(health.per_sample_limit(0.3, rows), rows) == pytest.approx(0.3)


def test_conversion_against_planted_gradients():
    """Samples mu + noise: means of N of them agree as the formula says."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(400, 16, 200, generator=generator, dtype=torch.float64)
    samples[..., 0] += 1.5
    per_sample = health.stability(samples.flatten(0, 1))
    assert health.stability(samples.mean(dim=1)) == pytest.approx(health.batch_stability(per_sample, 16), abs=0.02)


def test_jackknife_of_a_mean_is_students_interval():
    values = [1.0, 2.0, 4.0, 7.0]
    mean = sum(values) / 4
    low, high = jackknife([(sum(values) - one) / 3 for one in values], mean)
    error = math.sqrt(sum((one - mean) ** 2 for one in values) / 3 / 4)
    assert (high - low) / 2 == pytest.approx(3.18245 * error, rel=1e-5)
    assert jackknife([1.0, 2.0], 1.5) is None


def test_unit_rows_have_length_one():
    rows = unit_rows(torch.tensor([[3e-20, 4e-20], [0.0, 0.0], [1e20, 0.0]]))
    assert torch.linalg.vector_norm(rows, dim=1).tolist() == pytest.approx([1, 1])


# ---- hand examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norms", "status", "location"), [([1, 2, 60, 66], "pass", "h2"), ([1, 2, 120], "fail", "h2")])
def test_growth_is_judged_by_block(norms, status, location):
    one = health.from_numbers(residual_norms=norms).diagnostics["residual_growth"]
    assert (one.status, one.location, one.threshold) == (status, location, 50)
    assert one.per_layer[0] is None
    assert list(one.per_layer[1:]) == pytest.approx(health.block_growth(norms))


@pytest.mark.parametrize(("gradient", "status"), [(5e-8, "fail"), (2e-7, "pass")])
def test_gradient_floor_of_a_token(gradient, status):
    assert statuses(health.from_numbers(bp_grad_norms=[1.0, gradient]))["gradient_floor"] == status


@pytest.mark.parametrize(("accuracy", "difference", "status"), [(0.306, -0.043, "fail"), (0.401, 0.052, "pass")])
def test_depth_utility_of_two_accuracies(accuracy, difference, status):
    report = health.from_numbers(headline_acc=accuracy, frozen_baseline_acc=0.349)
    assert report.diagnostics["depth_utility"].status == status
    assert report.diagnostics["depth_utility"].value == pytest.approx(difference)


@pytest.mark.parametrize(("cosine", "rows", "status"), [(0.31, 128, "warn"), (0.29, 128, "pass"), (0.31, 512, "pass")])
def test_agreement_is_judged_at_one_batch_size(cosine, rows, status):
    report = health.from_numbers(residual_norms=[1, 1], cross_batch_stability=cosine, batch_size=rows)
    assert report.diagnostics["stability"].status == status


# ---- what the first version got wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        {"residual_norms": [1.0, NAN]},
        {"residual_norms": [1.0, math.inf]},
        {"bp_grad_norms": [1.0, NAN]},
        {"residual_norms": [1.0, 2.0], "cross_batch_stability": NAN},
        {"headline_acc": NAN, "frozen_baseline_acc": 0.3},
    ],
)
def test_a_diverged_network_is_invalid(numbers):
    report = health.from_numbers(**numbers)
    assert report.overall == "invalid"
    assert report.verdict.startswith("needs walk-back")
    json.dumps(report.to_dict(), allow_nan=False)


def test_nothing_measured_is_not_trustworthy():
    report = health.from_numbers()
    assert (report.overall, report.complete) == ("skipped", False)
    assert set(statuses(report).values()) == {"skipped"}
    assert report.verdict.startswith("incomplete")
    assert report.metrics()["health/status"] == 0


def test_a_missing_baseline_is_not_trustworthy():
    report = health.from_numbers(residual_norms=[1, 2], bp_grad_norms=[1, 1], cross_batch_stability=0.1)
    assert report.overall == "pass"
    assert not report.complete
    assert "depth_utility" in report.verdict


def test_lists_of_two_lengths_are_refused_and_text_indexes_nothing():
    with pytest.raises(InputError, match="3 residual norms beside 2 gradient norms"):
        health.from_numbers(residual_norms=[1, 2, 3], bp_grad_norms=[1, 2])
    assert "residual_growth" in str(health.from_numbers(residual_norms=[1, 2, 3]))


def test_percent_is_refused():
    with pytest.raises(InputError, match="percent"):
        health.from_numbers(headline_acc=61.5, frozen_baseline_acc=34.9)
    with pytest.raises(InputError, match="percent"):
        health.depth_from_scores([61.5] * 20, [34.9] * 20)
    with pytest.raises(InputError, match="percent"):
        health.HealthLimits(depth_margin=2.0)


def test_every_gradient_is_tested_not_the_last_alone():
    one = health.from_numbers(bp_grad_norms=[1.0, 1e-9, 1.0]).diagnostics["gradient_floor"]
    assert (one.status, one.location) == ("fail", "h1")


def test_collapse_and_total_growth_are_seen():
    assert statuses(health.from_numbers(residual_norms=[100, 1]))["collapse"] == "fail"
    report = health.from_numbers(residual_norms=[30.0**i for i in range(11)])
    assert statuses(report)["residual_growth"] == "pass"
    assert report.diagnostics["total_growth"].value == pytest.approx(5.9e14, rel=0.01)
    assert report.overall == "warn"


def test_agreement_below_zero_is_reported_with_its_sign():
    one = health.from_numbers(residual_norms=[1, 2], cross_batch_stability=-0.01, batch_size=1).diagnostics["stability"]
    assert one.value == pytest.approx(-0.01)
    assert judge_agreement(-0.02, (-0.03, -0.01)) == "warn"  # no mean of independent draws can be
    assert judge_agreement(-0.02, (-0.03, 0.01)) == "pass"
    assert judge_agreement(0.004, (0.001, 0.007)) == "pass"  # few samples agree by chance
    assert judge_agreement(0.009, (0.005, 0.013)) == "warn"


def judge_agreement(value, interval):
    from weightproof.diagnostics.agreement import Agreement
    from weightproof.diagnostics.judging import Levels, judged
    from weightproof.diagnostics.readings import Place

    levels = Levels((Place("h0", 0),), *((None,),) * 4)
    agreement = Agreement((value,), (interval,), (value,), 8)
    return judged(levels, agreement, "-", health.HealthLimits())["stability"].status


def test_few_items_leave_depth_utility_open():
    """Two points of accuracy on 500 items lie within the noise: the standard error is 2.9 points."""
    few = health.from_numbers(headline_acc=0.33, frozen_baseline_acc=0.30, num_items=500)
    many = health.from_numbers(headline_acc=0.33, frozen_baseline_acc=0.30, num_items=50_000)
    assert statuses(few)["depth_utility"] == "warn"
    assert statuses(many)["depth_utility"] == "pass"
    assert few.diagnostics["depth_utility"].interval is not None


@pytest.mark.parametrize("wrong", [NAN, math.inf, 0.0, -1.0, "50", True])
def test_thresholds_are_checked(wrong):
    with pytest.raises(InputError, match="block_growth"):
        health.HealthLimits(block_growth=wrong)


def test_thresholds_are_frozen():
    with pytest.raises(FrozenInstanceError):
        health.HealthLimits().block_growth = 1e9
    with pytest.raises(InputError, match="whole"):
        health.HealthLimits(min_batches=8.5)


def test_old_keys_are_kept():
    old = {
        "method_name", "notes", "residual_norms", "bp_grad_norms", "stability_layer", "cross_batch_stability",
        "headline_acc", "frozen_baseline_acc", "verdict", "thresholds",
    }  # fmt: skip
    numbers = {"residual_norms": [1, 2], "bp_grad_norms": [1, 1], "cross_batch_stability": 0.1}
    report = health.from_numbers(
        method_name="BP", notes="seed 42", **numbers, headline_acc=0.6, frozen_baseline_acc=0.35, num_items=1000
    )
    found = report.to_dict()
    assert old <= set(found)
    assert len(found["thresholds"]) == 4
    assert found["cross_batch_stability"] == 0.1
    assert {"schema", "diagnostics", "overall", "complete", "provenance"} <= set(found)
    assert str(report).startswith("BP: ")
    assert found["verdict"].startswith("incomplete")  # underflow was not given


# ---- depth utility --------------------------------------------------------------------------------------------------


def judge(depth):
    from weightproof.diagnostics.judging import Levels, judged

    empty = Levels((), (), (), (), ())
    return judged(empty, "-", depth, health.HealthLimits())["depth_utility"]


def pairs(gained, lost, kept, n=1000):
    """Right answers of a network and a baseline: gained, lost and kept ones."""
    network = [1.0] * gained + [0.0] * lost + [1.0] * kept + [0.0] * (n - gained - lost - kept)
    baseline = [0.0] * gained + [1.0] * lost + [1.0] * kept + [0.0] * (n - gained - lost - kept)
    return network, baseline


@pytest.mark.parametrize(
    ("gained", "lost", "status"), [(200, 50, "pass"), (50, 50, "fail"), (80, 55, "warn"), (20, 90, "fail")]
)
def test_depth_utility_is_a_paired_test(gained, lost, status):
    network, baseline = pairs(gained, lost, 300)
    one = judge(health.depth_from_scores(network, baseline))
    assert one.status == status
    assert one.value == pytest.approx((gained - lost) / 1000)


def test_pairing_sees_what_two_means_do_not():
    network, baseline = pairs(60, 20, 300)
    one = judge(health.depth_from_scores(network, baseline))
    means = health.from_numbers(headline_acc=0.36, frozen_baseline_acc=0.32, num_items=1000)
    assert one.status == "pass"
    assert means.diagnostics["depth_utility"].status == "warn"


def test_losses_are_better_below():
    generator = torch.Generator().manual_seed(0)
    baseline = 2.0 + torch.randn(200, generator=generator).abs()
    network = baseline - 0.5 + 0.1 * torch.randn(200, generator=generator)
    one = judge(health.depth_from_scores(network.tolist(), baseline.tolist(), metric="loss", higher_is_better=False))
    assert one.status == "pass"
    assert one.value == pytest.approx(0.5, abs=0.05)


def test_too_few_items_decide_nothing():
    assert judge(health.depth_from_scores([1.0] * 5, [0.0] * 5)).status == "skipped"
    with pytest.raises(InputError, match="not paired"):
        health.depth_from_scores([1.0], [1.0, 0.0])
    assert judge(health.depth_from_scores([NAN] * 20, [0.0] * 20)).status == "invalid"
