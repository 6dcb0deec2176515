"""Loss spikes from raw losses."""

import math

import pytest

from weightproof.spikes import is_loss_spike

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
