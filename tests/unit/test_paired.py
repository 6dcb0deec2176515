"""Paired sums, their bootstrap interval and the confidence sequence: against oracles, and what never changes."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.oracles import paired as oracle

from weightproof.errors import InputError
from weightproof.statistics.bootstrap import bca_levels, bootstrap, degrees_of_freedom, expanded_tail, resampled
from weightproof.statistics.confidence_sequence import _critical, _Moments
from weightproof.statistics.paired import METHODS, Interval, PairedSums, Sequential, interval, perplexity, random_order


def sample(num_groups=40, seed=0, change=0.01, spread=0.03, sigma=0.5):
    rng = np.random.default_rng(seed)
    weight = np.ceil(100 * np.exp(sigma * rng.normal(size=num_groups)))
    before = weight * rng.uniform(2, 4, num_groups)
    return before, before + weight * (change + spread * rng.standard_t(5, num_groups)), weight


def bounds(lower, upper, estimate=None):
    middle = (lower + upper) / 2 if estimate is None else estimate
    return Interval(middle, lower, upper, 0.95, 100.0, 100, "bca")


class TestEstimate:
    def test_is_the_ratio_of_sums(self):
        before, after, weight = sample()
        assert PairedSums(before, after, weight).estimate == pytest.approx(oracle.ratio(before, after, weight))

    def test_weighs_by_tokens_not_by_windows(self):
        weight = np.array([512.0, 256.0])
        sums = PairedSums(weight * np.log([40, 220]), weight * np.log([38, 260]), weight)
        assert perplexity(sums.estimate) == pytest.approx(1.02172172, abs=1e-8)

    def test_no_change_is_a_ratio_of_one_and_a_common_factor_is_the_ratio(self):
        before, _, weight = sample()
        assert perplexity(PairedSums(before, before, weight).estimate) == 1.0
        scaled = PairedSums(before, before + weight * math.log(1.3), weight)
        assert perplexity(scaled.estimate) == pytest.approx(1.3, abs=1e-9)

    def test_perplexity_never_raises(self):
        assert perplexity(1000.0) == math.inf
        assert perplexity(2.302585092994046) == pytest.approx(10.0)
        assert perplexity(-1e4) == 0.0

    def test_effective_size(self):
        assert PairedSums([1.0] * 8, [1.0] * 8, [3.0] * 8).effective_size == pytest.approx(8)
        weight = [81.0] * 5 + [1.0] * 45
        assert PairedSums(weight, weight, weight).effective_size == pytest.approx(450**2 / (5 * 81**2 + 45))

    def test_groups_without_weight_are_left_out(self):
        before, after, weight = sample()
        padded = PairedSums(*(np.append(array, 0.0) for array in (before, after, weight)))
        assert interval(padded) == interval(PairedSums(before, after, weight))

    def test_scores_give_the_difference_of_weighted_means(self):
        rng = np.random.default_rng(3)
        before, after, weight = rng.random((3, 30))
        found = PairedSums.of_scores(before, after, weight).estimate
        assert found == pytest.approx(np.average(after, weights=weight) - np.average(before, weights=weight))
        plain = PairedSums.of_scores(before, after)
        assert plain.estimate == pytest.approx((after - before).mean())
        assert plain.effective_size == pytest.approx(30)

    def test_tail_of_the_groups(self):
        tail = PairedSums([0.0] * 4, [3.0, 0.0, 2.0, 1.0], [1.0] * 4).tail(1.5)
        assert tail.quantiles == pytest.approx({0.5: 1.5, 0.9: 2.7, 0.95: 2.85, 0.99: 2.97})
        assert (tail.largest, tail.share_above) == (3.0, 0.5)
        weighted = PairedSums([0.0] * 3, [0.0, 20.0, 30.0], [1.0, 10.0, 10.0]).tail(1.5)
        assert weighted.share_above == pytest.approx(20 / 21)


class TestBadInput:
    @pytest.mark.parametrize(
        ("before", "after", "weight", "words"),
        [
            ([1.0, math.nan], [1.0, 1.0], [1.0, 1.0], "before of group 1 is not finite"),
            ([1.0, 1.0], [1.0, math.inf], [1.0, 1.0], "after of group 1 is not finite"),
            ([], [], [], "one per group"),
            ([[1.0]], [[1.0]], [[1.0]], r"shape \(1, 1\)"),
            (1.0, 1.0, 1.0, "one per group"),
            (["a"], [1.0], [1.0], "must be numbers"),
            ([1.0, 1.0], [1.0], [1.0, 1.0], "not paired: 2 before, 1 after, 2 weights"),
            ([1.0, 1.0], [1.0, 1.0], [1.0, -1.0], "weight of group 1 is negative"),
            ([0.0], [0.0], [0.0], "nothing was scored"),
            ([1.0, 1.0], [1.0, 1.0], [1.0, 0.0], "losses and weight 0"),
        ],
    )
    def test_no_sample_is_one_sentence(self, before, after, weight, words):
        with pytest.raises(InputError, match=words):
            PairedSums(before, after, weight)

    def test_scores_of_unequal_number(self):
        with pytest.raises(InputError, match="not paired"):
            PairedSums.of_scores([1.0, 0.0], [1.0])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"alpha": 1.5}, "alpha"),
            ({"alpha": -0.1}, "alpha"),
            ({"alpha": math.nan}, "alpha"),
            ({"replicates": 0}, "replicates"),
            ({"replicates": 100, "alpha": 0.01}, "replicates"),
            ({"method": "magic"}, "bca, percentile, confidence-sequence"),
            ({"min_effective_size": 0}, "min_effective_size"),
        ],
    )
    def test_options_that_make_no_interval(self, options, words):
        with pytest.raises(InputError, match=words):
            interval(PairedSums(*sample()), **options)

    def test_sequential(self):
        with pytest.raises(InputError, match="limit"):
            Sequential(math.nan)
        with pytest.raises(InputError, match="alpha"):
            Sequential(0.0, 0.0)
        test = Sequential(0.05)
        with pytest.raises(InputError, match="before its first group"):
            test.interval()
        with pytest.raises(InputError, match="not finite"):
            test.add(1.0, math.nan, 1.0)
        for weight in (0.0, -1.0):
            with pytest.raises(InputError, match="has losses, but weight"):
                test.add(1.0, 1.0, weight)
        assert test.add(0.0, 0.0, 0.0) is None
        assert test.num_groups == 0


class TestDegenerate:
    @pytest.mark.parametrize("method", METHODS)
    def test_equal_losses_give_zero_and_zero(self, method):
        before, _, weight = sample()
        found = interval(PairedSums(before, before, weight), method=method)
        assert (found.estimate, found.lower, found.upper, found.undecided) == (0.0, 0.0, 0.0, None)
        assert found.decide(0.0) == "accept"

    @pytest.mark.parametrize("method", METHODS)
    def test_a_constant_difference_per_token_has_zero_width(self, method):
        before, _, weight = sample()
        found = interval(PairedSums(before, before + 0.25 * weight, weight), method=method)
        assert found.lower == pytest.approx(0.25, rel=1e-7)
        assert found.upper == pytest.approx(0.25, rel=1e-7)

    @pytest.mark.parametrize("num_groups", [1, 2, 3, 15])
    def test_few_groups_are_undecided_and_say_so(self, num_groups):
        for method in METHODS:
            found = interval(PairedSums(*sample(num_groups, sigma=0.0)), method=method)
            assert found.undecided == f"effective sample too small: {num_groups:.1f} of at least 16"
            assert found.decide(10.0) is None

    def test_five_windows_with_nearly_all_tokens_are_undecided(self):
        before, after, _ = sample(50)
        weight = np.where(np.arange(50) < 5, 8100.0, 100.0)
        assert interval(PairedSums(before, after, weight)).undecided == "effective sample too small: 6.2 of at least 16"

    def test_one_large_window_among_many_has_no_degrees_of_freedom(self):
        before, after, weight = sample(200, sigma=0.0)
        weight[0] *= 50
        found = interval(PairedSums(before, after, weight))
        assert found.effective_size > 16
        assert found.undecided.startswith("effective sample too small: 1.2 degrees of freedom of at least 3")

    def test_one_group_that_differs_widens_the_interval_and_stays_finite(self):
        before, _, weight = sample(60, sigma=0.0)
        after = before.copy()
        after[7] += 50.0
        for method in METHODS:
            found = interval(PairedSums(before, after, weight), method=method)
            assert found.lower <= found.estimate <= found.upper
            assert math.isfinite(found.upper - found.lower)
            assert found.upper > 2 * found.estimate


class TestBootstrap:
    def test_equals_scipy_on_the_same_draws(self):
        sums = PairedSums(*sample(25, sigma=1.0))
        draws = resampled(sums, 2000)

        def ratio(difference, weight, axis=-1):
            return difference.sum(axis=axis) / weight.sum(axis=axis)

        class Drawn:
            bootstrap_distribution = draws

        expected = stats.bootstrap(
            (sums.difference, sums.weights),
            ratio,
            n_resamples=0,
            bootstrap_result=Drawn(),
            paired=True,
            vectorized=True,
            confidence_level=0.9,
            method="BCa",
        ).confidence_interval
        found = np.quantile(draws, bca_levels(sums, draws, 0.05))
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_agrees_with_the_oracle_and_its_own_draws(self):
        before, after, weight = sample(20, sigma=0.5)
        sums = PairedSums(before, after, weight)
        tail = expanded_tail(0.05, sums.effective_size, degrees_of_freedom(sums))
        draws = oracle.bootstrap_ratios(before, after, weight, 8000, seed=1)
        expected = oracle.bca(before, after, weight, draws, tail)
        method, found = bootstrap(sums, 0.1, "bca", 8000)
        width = expected[1] - expected[0]
        assert method == "bca"
        np.testing.assert_allclose(found, expected, atol=0.06 * width)
        np.testing.assert_allclose(
            np.quantile(resampled(sums, 8000), bca_levels(sums, resampled(sums, 8000), tail)), found, rtol=1e-12
        )

    def test_a_normal_sample_of_equal_weights_has_nearly_students_width(self):
        rng = np.random.default_rng(0)
        z = rng.normal(size=400)
        sums = PairedSums(np.full(400, 3.0), 3.0 + z, np.ones(400))
        found = interval(sums)
        half = stats.t.isf(0.025, 399) * z.std(ddof=1) / 20
        assert (found.upper - found.lower) / (2 * half) == pytest.approx(1.0, abs=0.06)

    def test_degrees_of_freedom(self):
        rng = np.random.default_rng(1)
        normal = PairedSums(np.zeros(400), rng.normal(size=400), np.ones(400))
        assert degrees_of_freedom(normal) == pytest.approx(399, rel=0.15)
        heavy = PairedSums(np.zeros(400), rng.standard_t(3, 400), np.ones(400))
        assert degrees_of_freedom(heavy) < 200
        weight = np.array([10.0] * 4 + [1.0] * 60)
        unequal = PairedSums(np.zeros(64), rng.normal(size=64) * weight, weight)
        assert degrees_of_freedom(unequal) <= (4 * 100 + 60) ** 2 / (4 * 1e4 + 60)

    def test_display_and_log_agree(self):
        found = interval(PairedSums(*sample()))
        assert math.log(perplexity(found.upper)) == pytest.approx(found.upper, abs=1e-12)

    def test_covers_the_truth(self):
        rng, hits = np.random.default_rng(7), 0
        for _ in range(200):
            weight = np.ceil(100 * np.exp(rng.normal(size=60)))
            sums = PairedSums(3 * weight, weight * (3.01 + 0.02 * rng.standard_t(5, 60)), weight)
            found = interval(sums, replicates=1000)
            hits += found.lower <= 0.01 <= found.upper
        assert hits >= 182  # 91 %; five standard deviations below 98 %, 2.6 below 95 %

    def test_many_groups_are_drawn_in_parts_of_bounded_size(self, monkeypatch):
        sums = PairedSums(*sample(50))
        whole = resampled(sums, 300)
        monkeypatch.setattr("weightproof.statistics.bootstrap._CHUNK_ELEMENTS", 50 * 7)
        np.testing.assert_array_equal(resampled(sums, 300), whole)


class TestConfidenceSequence:
    @pytest.mark.parametrize(("num_groups", "alpha"), [(8, 0.05), (30, 0.02), (200, 0.05)])
    def test_its_critical_value_is_where_the_mixture_reaches_one_over_alpha(self, num_groups, alpha):
        evidence = oracle.mixture_evidence(_critical(num_groups, alpha), num_groups, 1.0)
        assert evidence == pytest.approx(1 / alpha, rel=1e-5)

    def test_rejects_nothing_before_there_is_evidence(self):
        assert _critical(1, 0.05) is None
        assert _critical(2, 0.001) is None

    def test_moments_are_those_of_the_whole_sample(self):
        before, after, weight = sample(37, sigma=1.0)
        moments = _Moments()
        for group in zip(after - before, weight, strict=True):
            moments.add(*map(float, group))
        d, w = after - before, weight
        d, w = d - d.mean(), w - w.mean()
        expected = [(d * d).sum(), (d * w).sum(), (w * w).sum()]
        expected += [(d**3).sum(), (d * d * w).sum(), (d * w * w).sum(), (w**3).sum()]
        found = [getattr(moments, name) for name in ("dd", "dw", "ww", "ddd", "ddw", "dww", "www")]
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    @pytest.mark.parametrize("seed", range(4))
    def test_its_ends_are_where_the_statistic_reaches_the_critical_value(self, seed):
        before, after, weight = sample(60, seed=seed, spread=0.003, sigma=0.2)
        after += weight * 0.02 * np.random.default_rng(seed).exponential(size=60)  # skewed
        found = interval(PairedSums(before, after, weight), method="confidence-sequence")
        critical, n = _critical(60, 0.05), 60
        skew = oracle.skewness(before, after, weight, found.estimate)
        at_upper = oracle.t_statistic(before, after, weight, found.upper)
        at_lower = oracle.t_statistic(before, after, weight, found.lower)
        assert skew > 0.5
        assert at_lower == pytest.approx(critical, rel=1e-6)  # the side that skewness would narrow stays
        assert at_upper < -critical
        assert oracle.hall(at_upper, skew, n) == pytest.approx(-critical, rel=1e-6)

    def test_skewness_widens_the_other_side_when_it_is_negative(self):
        before, _, weight = sample(60)
        noise = np.random.default_rng(0).exponential(size=60) ** 2
        up = interval(PairedSums(before, before + weight * noise, weight), method="confidence-sequence")
        down = interval(PairedSums(before, before - weight * noise, weight), method="confidence-sequence")
        np.testing.assert_allclose((-up.upper, -up.lower), (down.lower, down.upper), rtol=1e-9)

    def test_interval_does_not_depend_on_when_it_is_asked(self):
        groups = list(zip(*sample(60), strict=True))
        one, other = Sequential(0.5), Sequential(-0.5)
        for group in groups:
            one.add(*group)
        for group in reversed(groups):
            other.add(*group)
        assert other.interval().upper == pytest.approx(one.interval().upper, rel=1e-9)
        batch = interval(PairedSums(*zip(*groups, strict=True)), method="confidence-sequence", min_effective_size=20)
        assert batch.lower == pytest.approx(one.interval().lower, rel=1e-9)

    @pytest.mark.parametrize(("change", "expected"), [(0.0, "accept"), (0.1, "reject")])
    def test_decides_clear_cases_long_before_the_end_and_keeps_the_decision(self, change, expected):
        before, after, weight = sample(400, change=change, sigma=0.3)
        test = Sequential(math.log(1.05))
        order = random_order(400, "windows")
        for i in order:
            if test.add(before[i], after[i], weight[i]):
                break
        assert test.decision == expected
        assert test.num_groups < 100
        assert test.total_weight == pytest.approx(weight[order[: test.num_groups]].sum())
        for _ in range(50):  # evidence to the contrary, after the decision
            assert test.add(300.0, 300.0 - 1000 * (change - 0.05), 100.0) == expected

    def test_never_decides_below_its_effective_size(self):
        test = Sequential(0.05, accept_from=0)
        for i in range(19):
            assert test.add(300.0, 300.0 + i % 2 * 0.01, 100.0) is None
        assert test.interval().undecided == "effective sample too small: 19.0 of at least 20"
        assert test.add(300.0, 300.0, 100.0) == "accept"

    @pytest.mark.parametrize(("change", "expected"), [(0.0, 50), (0.1, 20)])
    def test_accepts_no_sooner_than_asked_and_rejects_sooner(self, change, expected):
        test = Sequential(0.05, accept_from=50)
        while test.add(300.0, 300.0 + 100 * change, 100.0) is None:
            pass
        assert test.num_groups == expected

    def test_very_unequal_weights_have_no_interval_and_no_decision(self):
        test = Sequential(0.05, min_effective_size=1)
        for weight in (1.0,) * 30 + (1e6,):
            test.add(3 * weight, 3.01 * weight, weight)
        found = test.interval()
        assert (found.lower, found.upper) == (None, None)
        assert found.undecided == "too unequal for an interval: 31 groups, worth 1.0 equal ones"
        assert found.decide(1.0) is None

    def test_wrong_acceptances_are_rare_however_often_one_looks(self):
        limit, rng, accepted = math.log(1.05), np.random.default_rng(11), 0
        for _ in range(300):
            weight = np.ceil(100 * np.exp(0.5 * rng.normal(size=150)))
            noise = 0.02 * (rng.exponential(size=150) - 1) + 0.02 * rng.standard_t(3, 150)
            test = Sequential(limit, accept_from=0)
            for group in zip(3 * weight, weight * (3 + limit + noise), weight, strict=True):
                if test.add(*group):
                    break
            accepted += test.decision == "accept"
        assert accepted <= 15

    def test_memory_does_not_grow(self):
        test = Sequential(10.0, min_effective_size=1e9)
        for i in range(100):
            test.add(1.0 + i, 2.0, 3.0)
        size = sum(sys.getsizeof(getattr(test._moments, name)) for name in _Moments.__slots__)
        for i in range(5000):
            test.add(1.0 + i, 2.0, 3.0)
        assert sum(sys.getsizeof(getattr(test._moments, name)) for name in _Moments.__slots__) == size


class TestDecide:
    @pytest.mark.parametrize(
        ("lower", "upper", "limit", "expected"),
        [
            (-0.2, -0.05, -0.01, "accept"),  # promised a gain of .01
            (0.05, 0.2, -0.01, "reject"),
            (-0.002, -0.0001, -0.01, "reject"),  # a gain, but surely a smaller one
            (0.0, 0.1, -0.01, "reject"),
            (-0.2, 0.0, -0.01, None),
            (-0.4, -0.1, -0.01, "accept"),
            (0.015, 0.03, 0.01, "reject"),  # surely worse by more than .01
            (0.005, 0.02, 0.01, None),
            (math.log(0.9), math.log(1.01), math.log(1 - 0.05 / 100), None),
            (math.log(0.7), math.log(0.83), -0.2, None),
            (math.log(0.7), math.log(0.8187), -0.2, "accept"),
        ],
    )
    def test_the_interval_decides_never_the_estimate(self, lower, upper, limit, expected):
        assert bounds(lower, upper).decide(limit) == expected
        assert bounds(lower, upper, estimate=-9.0).decide(limit) == expected

    def test_a_missing_or_untrusted_interval_decides_nothing(self):
        assert Interval(-0.1, None, None, 0.95, 100.0, 100, "bca").decide(0.0) is None
        assert Interval(-0.1, -0.2, -0.05, 0.95, 4.8, 50, "bca", "too small").decide(0.0) is None

    @pytest.mark.parametrize(("after", "expected"), [(44.0, "accept"), (46.0, "reject")])
    def test_a_ratio_exactly_at_the_limit_passes(self, after, expected):
        weight = np.arange(100.0, 130.0)
        sums = PairedSums(weight * math.log(40), weight * math.log(after), weight)
        assert interval(sums).decide(math.log(1.10)) == expected

    def test_a_gain_too_small_for_its_floor_is_not_accepted(self):
        weight = np.full(40, 100.0)
        sums = PairedSums(weight * math.log(100), weight * math.log(99.97), weight)
        assert interval(sums).decide(math.log(99.95 / 100)) == "reject"


class TestWhatNeverChanges:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 20), factor=st.floats(1e-3, 1e3))
    def test_losses_in_other_units(self, seed, factor):
        before, after, weight = sample(50, seed=seed, sigma=0.3)
        for method in METHODS:
            one = interval(PairedSums(before, after, weight), method=method, replicates=200)
            other = interval(PairedSums(before * factor, after * factor, weight), method=method, replicates=200)
            np.testing.assert_allclose(
                (other.estimate, other.lower, other.upper),
                np.array((one.estimate, one.lower, one.upper)) * factor,
                rtol=1e-6,
                atol=1e-9 * factor,
            )

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 20), factor=st.floats(1e-3, 1e3))
    def test_weights_in_other_units(self, seed, factor):
        before, after, weight = sample(50, seed=seed, sigma=0.3)
        for method in METHODS:
            one = interval(PairedSums(before, after, weight), method=method, replicates=200)
            other = interval(PairedSums(before, after, weight * factor), method=method, replicates=200)
            np.testing.assert_allclose(
                np.array((other.estimate, other.lower, other.upper)) * factor,
                (one.estimate, one.lower, one.upper),
                rtol=1e-6,
                atol=1e-9,
            )
            assert other.effective_size == pytest.approx(one.effective_size)

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10**6), order=st.permutations(range(30)))
    def test_order_of_groups(self, seed, order):
        groups = sample(30, seed=seed)
        for method in METHODS:
            one = interval(PairedSums(*groups), method=method, replicates=200)
            assert interval(PairedSums(*(array[list(order)] for array in groups)), method=method, replicates=200) == one

    def test_a_common_difference_moves_the_interval(self):
        before, after, weight = sample()
        one = interval(PairedSums(before, after, weight), method="confidence-sequence")
        other = interval(PairedSums(before, after + 0.5 * weight, weight), method="confidence-sequence")
        assert other.upper == pytest.approx(one.upper + 0.5, abs=1e-8)

    def test_more_confidence_is_wider(self):
        sums = PairedSums(*sample())
        for method in METHODS:
            narrow, wide = (interval(sums, alpha=alpha, method=method) for alpha in (0.1, 0.01))
            assert wide.lower < narrow.lower < narrow.upper < wide.upper

    def test_the_order_of_reading_is_repeatable_and_a_permutation(self):
        order = random_order(100, "digest")
        assert sorted(order.tolist()) == list(range(100))
        np.testing.assert_array_equal(order, random_order(100, "digest"))
        assert order.tolist() != random_order(100, "another").tolist()
        assert order.tolist() != list(range(100))
