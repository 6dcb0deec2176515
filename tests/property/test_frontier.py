"""The frontier of a multiple-choice knapsack against trying everything, and what must hold for any items."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.knapsack import least_at_most, smallest_within

from weightproof.planner.frontier import frontier

# Losses of few binary digits: their sums are exact in any order.
_LOSSES = st.integers(0, 400).map(lambda value: value / 64) | st.just(math.inf)
_ITEMS = st.lists(st.lists(st.tuples(st.integers(0, 40), _LOSSES), min_size=1, max_size=4), min_size=1, max_size=5)


def _total(items, choice):
    pairs = [item[index] for item, index in zip(items, choice, strict=True)]
    return sum(size for size, _ in pairs), sum(loss for _, loss in pairs)


@settings(max_examples=150, deadline=None)
@given(_ITEMS, st.integers(0, 2000).map(lambda value: value / 64))
def test_the_smallest_choice_within_a_budget_is_that_of_trying_everything(items, budget):
    choice = frontier(items).within(budget)
    expected = smallest_within(items, budget)
    assert (choice is None) is (expected is None)
    if choice is not None:
        size, loss = _total(items, choice)
        assert (size, loss <= budget) == (expected, True)


@settings(max_examples=100, deadline=None)
@given(_ITEMS, st.integers(0, 160))
def test_the_best_choice_of_a_size_is_that_of_trying_everything(items, size):
    found = frontier(items)
    choice, expected = found.at_most(size), least_at_most(items, size)
    if choice is not None:
        total, loss = _total(items, choice)
        assert total <= size
        assert loss == expected
    else:
        assert math.isinf(expected)
    assert _total(items, found.least())[1] == found.losses[-1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 5)), min_size=1, max_size=4), min_size=1, max_size=12
    ),
    st.floats(0, 20),
    st.floats(0, 20),
    st.sampled_from([60, 1 << 20]),
)
def test_a_larger_budget_never_gives_a_larger_choice(items, one, other, cells):
    """Also where the frontier is thinned out."""
    found = frontier(items, most_cells=cells)
    low, high = sorted((one, other))
    small, large = found.within(low), found.within(high)
    if small is not None:
        assert large is not None
        assert _total(items, large)[0] <= _total(items, small)[0]
        assert _total(items, small)[1] <= low + 1e-9


def test_a_thinned_frontier_says_so_and_stays_close():
    rng = random.Random(0)
    pairs = [(rng.randint(10**5, 10**6), 10 ** rng.uniform(-3, 1)) for _ in range(14)]
    items = [[(weights * bits, harm * 4.0**-bits) for bits in (2, 3, 4, 8)] for weights, harm in pairs]
    exact, thin = frontier(items), frontier(items, most_cells=14 * 100)
    assert len(exact.sizes) > 200
    assert exact.is_exact
    assert not thin.is_exact
    for budget in (0.02, 0.1, 0.5):
        best, found = _total(items, exact.within(budget))[0], _total(items, thin.within(budget))
        assert found[1] <= budget
        assert best <= found[0] <= 1.05 * best


def test_a_nan_counts_as_infinite_and_no_option_is_an_error():
    assert frontier([[(1, math.nan), (2, 1.0)]]).within(5.0) == (1,)
    assert frontier([[(1, math.nan)]]).within(5.0) is None
    with pytest.raises(ValueError, match="at least one option"):
        frontier([[(1, 1.0)], []])
