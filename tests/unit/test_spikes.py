"""Loss spikes from raw losses."""

import math
import random
import statistics

import pytest

from weightproof.statistics import spikes
from weightproof.statistics.spikes import (
    is_gross_norm,
    is_high,
    is_lasting,
    is_loss_spike,
    is_witnessed,
    lasting_score,
    level_of,
    most_near,
    norm_score,
    num_near_guessing,
    recent_level,
)

STEADY = [2.0 + 0.02 * (-1) ** i for i in range(40)]


@pytest.mark.parametrize(
    ("history", "window", "expected"),
    [
        (STEADY, [2.01, 1.99, 2.0], False),
        (STEADY, [2.3, 2.3, 2.3], False),
        (STEADY, [4.0, 4.1, 4.0], True),
        (STEADY, [2.0, 2.0, math.nan], True),
        (STEADY, [2.0, math.inf], True),
        (STEADY, [], None),
        (STEADY[:5], [9.0], None),
        ([2.0] * 40, [2.001], False),
        ([5.0 - 0.1 * i for i in range(40)], [1.0, 0.9], False),
    ],
)
def test_spike_needs_both_a_robust_deviation_and_a_ratio(history, window, expected):
    assert is_loss_spike(history, window) is expected


# ---- against the moving average -------------------------------------------------------------------------------------


def wandering(count, *, seed=0, around=2.0, spread=0.03, fall=0.0):
    draw = random.Random(seed)
    return [around * math.exp(draw.gauss(0.0, spread) - fall * i) for i in range(count)]


def test_level_is_the_median_first_and_follows_slowly_after():
    start = [math.e] * spikes.START_UP
    assert level_of(start[1:]) is None, "too few to tell"
    assert level_of(start) == spikes.Level(1.0, spikes.LEAST_SPREAD)
    with_an_outlier = [math.e] * (spikes.START_UP - 1) + [1e9]
    assert level_of(with_an_outlier) == level_of(start), "one wild value in the start-up teaches nothing"
    risen = level_of([*start, 50.0])
    assert risen.mean == pytest.approx(1.0 + 0.03 * 3 * spikes.LEAST_SPREAD), "a later one as if 3 spreads away"
    useless = [math.nan, math.inf, 0.0]
    assert level_of([*useless, *start, *useless]) == level_of(start)


def test_level_of_noise_has_its_mean_and_spread():
    values = wandering(128, spread=0.1)
    level, logs = level_of(values), [math.log(v) for v in values]
    assert level.mean == pytest.approx(statistics.fmean(logs), abs=0.05)
    assert level.spread == pytest.approx(0.1, rel=0.4)


@pytest.mark.parametrize(
    ("window", "lasts"),
    [
        pytest.param([2.0, 2.0, 3.5, 3.4, 3.5], True, id="rose and stayed"),
        pytest.param([2.0, 3.5, 3.5, 3.5, 2.1], False, id="came back"),
        pytest.param([9.0, 2.0, 2.0, 2.0], False, id="one bad batch"),
        pytest.param([2.0, 2.0, 9.0], False, id="one bad batch at the very end"),
        pytest.param([2.6, 2.6, 2.6], False, id="a harder part of the data"),
        pytest.param([math.nan] * 3, True, id="not finite"),
        pytest.param([3.5, 3.5], False, id="too short to have lasted"),
    ],
)
def test_a_loss_acts_by_itself_only_when_it_rose_far_and_stayed(window, lasts):
    assert is_lasting(lasting_score(wandering(60), window)) is lasts


# Losses of a model that had not seen its data before: as they fell, spreads of them are wide.
STEEP = [5.63, 5.36, 4.92, 4.42, 4.2, 3.92, 3.76, 3.36, 3.25, 2.98, 2.81, 2.65, 2.68, 2.42, 2.35, 2.46, 2.27, 2.26]
STEEP += [1.91, 1.76, 1.94, 2.03, 1.99, 2.01, 1.96, 1.72, 1.56, 1.97, 2.03, 1.82, 1.62, 1.53]


@pytest.mark.parametrize(
    ("window", "lasts"),
    [
        pytest.param([8.7, 8.73, 8.44], True, id="worse by a quarter than it ever was"),
        pytest.param([6.5, 6.5, 6.5], False, id="about as before it was trained"),
        pytest.param([8.7, 8.73, 1.6], False, id="came back"),
        pytest.param([1.61, 1.49, 1.61], False, id="healthy"),
    ],
)
def test_a_loss_that_fell_steeply_acts_when_it_is_worse_than_ever(window, lasts):
    assert level_of(STEEP).score(8.7).z < spikes.LASTING_Z, "by spreads alone it is not seen"
    assert is_lasting(lasting_score(STEEP, window)) is lasts
    assert is_high(STEEP, 8.7)
    assert not is_high(STEEP, 5.63)
    assert lasting_score(STEEP[: spikes.START_UP - 1], [8.7, 8.7, 8.7]) is None, "too little is known"


def test_a_harder_part_of_noisy_data_is_no_worse_than_ever():
    history = wandering(128, spread=0.15)
    assert max(history) * spikes.WORST_RATIO < 3.7
    assert not is_lasting(lasting_score(history, [3.7, 3.7, 3.7]))


def test_blocks_of_very_different_difficulty_are_left_alone():
    blocks = [*wandering(30, around=3.0), *wandering(30, around=1.2), *wandering(30, around=3.0)]
    assert not any(is_lasting(lasting_score(blocks[:at], blocks[at : at + 5])) for at in range(25, 90, 5))


def test_short_windows_are_seen_together_with_the_losses_before():
    history = wandering(60)
    assert not is_lasting(lasting_score([*history, 3.5], [3.5]))
    assert is_lasting(lasting_score([*history, 3.5, 3.5], [3.5]))
    assert lasting_score(history, []) is None
    assert lasting_score(history[: spikes.START_UP - 1], [9.0, 9.0, 9.0]) is None


def test_with_losses_near_zero_factors_are_nothing():
    assert not is_lasting(lasting_score(wandering(60, around=0.01), [0.1, 0.1, 0.1]))


def test_a_smaller_rise_needs_the_gradient_norm_as_a_witness():
    losses, norms = wandering(60), wandering(60, around=0.5, spread=0.2)
    rise = lasting_score(losses, [2.7, 2.7, 2.7])
    assert not is_lasting(rise)
    assert is_witnessed(rise, norm_score(norms, [0.5, 6.0, 0.6]))
    assert not is_witnessed(rise, norm_score(norms, [0.5, 1.0, 0.6]))
    assert not is_witnessed(lasting_score(losses, [2.1, 2.0, 2.1]), norm_score(norms, [6.0])), "a bad batch"
    assert not is_witnessed(rise, None)


def test_only_a_gradient_that_is_useless_is_not_stepped_with():
    norms = wandering(60, around=0.5, spread=0.3)
    assert [is_gross_norm(norms, norm) for norm in (math.nan, math.inf, 500.0)] == [True] * 3
    assert [is_gross_norm(norms, norm) for norm in (0.5, 5.0, 20.0, 0.0)] == [False] * 4
    assert not is_gross_norm(norms[:5], 1e6), "nothing is known yet"
    assert is_gross_norm([], math.nan)


def test_one_loss_can_be_high():
    assert is_high(wandering(60), 4.0)
    assert not is_high(wandering(60), 2.3)
    assert not is_high([], 4.0)


# ---- near guessing --------------------------------------------------------------------------------------------------

GUESSING = math.log(40)


def test_the_recent_level_is_of_the_last_values_and_of_noise_around_their_trend():
    steep = wandering(40, around=8.0, spread=0.03, fall=0.04)
    level = recent_level(steep)
    assert level.mean == pytest.approx(math.log(statistics.median(steep[-spikes.RECENT :])), abs=0.05)
    assert level.spread < 0.06 < level_of(steep).spread
    assert recent_level(steep[: spikes.RECENT - 1]) is None


@pytest.mark.parametrize(
    ("window", "count"),
    [
        pytest.param([5.2, 5.1, 5.3, 5.0, 1.8], 4, id="a burst"),
        pytest.param([1.7, 1.7, 5.2, 1.8, 1.7], 1, id="one bad batch"),
        pytest.param([2.9, 2.8, 3.0, 2.7, 2.9], 0, id="text that is merely hard"),
        pytest.param([3.5, 3.5, 3.4, 3.5, 1.8], 4, id="a burst of which a third is random"),
        pytest.param([1.7, math.nan, 1.7], 1, id="no number"),
        pytest.param([], 0, id="no step"),
    ],
)
def test_steps_near_guessing_are_counted(window, count):
    assert num_near_guessing(STEEP, window, GUESSING) == count


def test_a_burst_that_began_in_the_window_before_is_counted_whole():
    assert num_near_guessing([*STEEP, 5.2, 5.1], [5.0, 1.8], GUESSING) == 3
    assert num_near_guessing([*STEEP, 5.2, 5.1], [1.8, 5.0], GUESSING) == 1


def test_guessing_says_nothing_of_a_model_that_hardly_does_better():
    assert num_near_guessing([3.6] * 40, [3.8] * 5, GUESSING) is None
    assert num_near_guessing(wandering(40, around=1.1, spread=0.06), [1.35] * 5, math.log(4)) == 0, "few symbols"
    assert num_near_guessing(STEEP, [5.2] * 5, None) is None
    assert num_near_guessing(STEEP[:10], [5.2] * 5, GUESSING) is None


def test_a_few_bad_steps_among_many_do_not_cost_the_window():
    assert [most_near(steps) for steps in (1, 5, 10, 15, 50, 100)] == [1, 1, 1, 2, 9, 19]


@pytest.mark.parametrize("seed", range(20))
def test_falling_and_noisy_losses_are_left_alone(seed):
    """Healthy curves: a fall by half with 10 % of noise, windows of 10 steps, and of 1."""
    losses = wandering(300, seed=seed, around=4.0, spread=0.1, fall=0.0025)
    norms = wandering(300, seed=seed, around=1.0, spread=0.5)
    for width in (1, 10):
        for start in range(0, 300, width):
            score = lasting_score(losses[:start], losses[start : start + width])
            assert not is_lasting(score)
            assert not is_witnessed(score, norm_score(norms[:start], norms[start : start + width]))
    assert not any(is_gross_norm(norms[:i], norm) for i, norm in enumerate(norms))
