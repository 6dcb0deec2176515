"""Accuracies of the same examples: Newcombe's interval and McNemar's test."""

import math

import numpy as np
import pytest
from scipy import stats
from tests.oracles import paired as oracle

from weightproof.errors import InputError
from weightproof.statistics.proportions import PairedCounts, mcnemar, negated, newcombe, paired_counts, wilson

# Airway hyper-responsiveness before and after a treatment (Bentur and others, 2009), a textbook example.
BENTUR = PairedCounts(both=1, lost=7, gained=1, neither=12)


class TestCounts:
    def test_pairs(self):
        counts = paired_counts(["right", "right", "wrong", "wrong"], ["right", "wrong", "right", "wrong"])
        assert counts == PairedCounts(1, 1, 1, 1)
        assert (counts.num_examples, counts.before, counts.after) == (4, 0.5, 0.5)

    def test_answers_missing_before_are_left_out_and_ties_count_as_asked(self):
        answers = ["right"] * 8 + ["wrong"] + ["tie"] + ["abstained"] * 2
        assert paired_counts(answers, answers).before == pytest.approx(0.9)
        assert paired_counts(answers, answers).excluded == 2
        assert paired_counts(answers, answers, ties="wrong").after == pytest.approx(0.8)

    def test_falling_silent_counts_as_wrong(self):
        counts = paired_counts(["right"] * 4, ["right", "abstained", "abstained", "right"])
        assert counts == PairedCounts(both=2, lost=2, gained=0, neither=0)

    @pytest.mark.parametrize(
        ("before", "after", "options", "words"),
        [
            (["right"], [], {}, "not paired: 1 before and 0 after"),
            ([], [], {}, "not paired"),
            (["right"], ["maybe"], {}, "unknown answer 'maybe'"),
            (["right"], ["right"], {"ties": "half"}, "ties"),
        ],
    )
    def test_bad_answers(self, before, after, options, words):
        with pytest.raises(InputError, match=words):
            paired_counts(before, after, **options)

    @pytest.mark.parametrize("count", [-1, 1.5, None])
    def test_bad_counts(self, count):
        with pytest.raises(InputError, match="lost must be a whole number"):
            PairedCounts(1, count, 1, 1)

    def test_nothing_answered_before(self):
        counts = paired_counts(["abstained"] * 3, ["right"] * 3)
        assert math.isnan(counts.before)
        with pytest.raises(InputError, match="no example was answered"):
            newcombe(counts)


class TestNewcombe:
    def test_published_examples(self):
        found = newcombe(PairedCounts(both=36, lost=12, gained=2, neither=0))
        assert found.estimate == pytest.approx(-0.2)
        assert (found.lower, found.upper) == pytest.approx((-0.3404, -0.0569), abs=1e-4)  # Newcombe 1998, table II
        assert (newcombe(BENTUR).lower, newcombe(BENTUR).upper) == pytest.approx((-0.507, -0.026), abs=5e-4)

    @pytest.mark.parametrize("seed", range(12))
    def test_agrees_with_the_oracle(self, seed):
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(rng.integers(1, 200), rng.dirichlet([0.6] * 4)).tolist()
        found = newcombe(PairedCounts(*counts), alpha=0.1)
        assert (found.lower, found.upper) == pytest.approx(oracle.newcombe(*counts, alpha=0.1), abs=1e-9)
        assert -1 - 1e-12 <= found.lower <= found.estimate <= found.upper <= 1 + 1e-12

    def test_wilson_is_scipys(self):
        expected = stats.binomtest(9, 12).proportion_ci(0.9, method="wilson")
        assert wilson(9, 12, alpha=0.1) == pytest.approx((expected.low, expected.high))

    def test_pairs_are_never_wider_than_independent_samples_when_they_agree(self):
        answers = ["right"] * 8 + ["wrong"] * 2
        for repeats in (1, 10):
            counts = paired_counts(answers * repeats, answers * repeats)
            found = newcombe(counts)
            low, high = wilson(counts.both, counts.num_examples)
            unpaired = math.hypot(high - counts.before, counts.before - low)
            assert found.upper - found.estimate <= unpaired
        assert found.upper - found.estimate < 0.5 * unpaired

    def test_before_and_after_swapped_negates(self):
        one = newcombe(PairedCounts(30, 8, 3, 9))
        other = newcombe(PairedCounts(30, 3, 8, 9))
        assert (negated(one).lower, negated(one).upper) == pytest.approx((other.lower, other.upper))
        assert negated(one).estimate == pytest.approx(other.estimate)

    def test_a_loss_of_accuracy_against_a_limit(self):
        assert negated(newcombe(PairedCounts(900, 2, 2, 96))).decide(0.01) == "accept"
        assert negated(newcombe(PairedCounts(700, 200, 2, 98))).decide(0.01) == "reject"
        assert negated(newcombe(PairedCounts(90, 1, 1, 8))).decide(0.01) is None

    def test_few_examples_are_undecided(self):
        found = newcombe(PairedCounts(10, 0, 0, 0))
        assert found.undecided == "effective sample too small: 10.0 of at least 16"
        assert negated(found).decide(1.0) is None

    def test_covers_the_truth(self):
        rng, hits = np.random.default_rng(5), 0
        cells = np.array([0.75, 0.08, 0.05, 0.12])
        for _ in range(400):
            found = newcombe(PairedCounts(*rng.multinomial(100, cells).tolist()))
            hits += found.lower <= cells[2] - cells[1] <= found.upper
        assert hits >= 366


class TestMcNemar:
    def test_published_examples(self):
        assert mcnemar(BENTUR, method="exact") == pytest.approx(0.0703, abs=1e-4)
        assert mcnemar(BENTUR) == pytest.approx(0.0391, abs=1e-4)

    @pytest.mark.parametrize("lost", [0, 1, 4, 10])
    @pytest.mark.parametrize("gained", [0, 1, 4, 11])
    def test_exact_is_the_binomial_test_and_mid_p_is_no_larger(self, lost, gained):
        counts = PairedCounts(5, lost, gained, 5)
        expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert mcnemar(counts, method="exact") == pytest.approx(expected)
        assert 0 < mcnemar(counts) <= mcnemar(counts, method="exact")

    def test_as_many_lost_as_gained(self):
        assert mcnemar(PairedCounts(5, 3, 3, 5), method="exact") == 1.0
        assert mcnemar(PairedCounts(5, 3, 3, 5)) == pytest.approx(1 - stats.binom.pmf(3, 6, 0.5) / 2)
        assert mcnemar(PairedCounts(5, 0, 0, 5)) == 1.0

    def test_unknown_method(self):
        with pytest.raises(InputError, match="exact or mid-p"):
            mcnemar(BENTUR, method="chi2")
