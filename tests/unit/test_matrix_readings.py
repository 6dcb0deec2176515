"""What a bound, or a change with NaN in it, does not tell is None: in one process as in many."""

import math

import pytest
import torch
from torch import nn

from weightproof.readings.changed_matrices import relative_delta
from weightproof.readings.matrices import bound_reading, fit_reading
from weightproof.weights import iter_weight_matrices


@pytest.fixture
def matrix():
    torch.manual_seed(0)
    (found,) = iter_weight_matrices(nn.Linear(64, 48, bias=False))
    return found


@pytest.mark.parametrize("delta", [0.0, 1e-9, 1e-3, 10.0])
def test_what_a_bound_tells_does_not_depend_on_the_size_of_the_change(matrix, delta):
    reading, fit = fit_reading(matrix, matrix.load())
    assert fit is not None
    bound = bound_reading(matrix, fit, delta)
    assert (bound.sigma_mp, bound.edge_plus, bound.num_spikes) == (reading.sigma_mp, reading.edge_plus, fit.num_spikes)
    assert (bound.num_spikes_low or 0) <= fit.num_spikes <= (bound.num_spikes_high or 0)
    assert bound.top_over_edge is bound.spike_energy is bound.ks_distance is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_change_into_or_out_of_what_is_not_finite_has_no_size(value):
    weight, broken = torch.randn(3, 4), torch.randn(3, 4)
    broken[1, 2] = value
    assert relative_delta(broken, weight) is relative_delta(weight, broken) is None
