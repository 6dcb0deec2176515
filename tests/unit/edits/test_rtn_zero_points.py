"""Round-to-nearest with a zero point, against a slow float64 oracle, and its contract on both grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edit_cases import CASES, case, matrix_of, oracle, turned
from hypothesis import given, settings
from hypothesis import strategies as st

from weightproof.edits import RTN

edits_oracle, rtn_oracle = oracle("edits"), oracle("rtn")
GRIDS = [("channel", None), ("tensor", None), ("group", 8), ("group", 7)]


def close_to(planned, weight, wanted, steps):
    """Equal up to storage rounding; an element within float32 rounding of a tie may go to either level."""
    difference = np.abs(planned.double().numpy() - wanted)
    rounding = (torch.finfo(weight.dtype).eps / 2 + 4e-7) * (np.abs(wanted) + steps) + 1e-37
    quotient = np.abs(weight.double().numpy()) / np.where(steps == 0, 1, steps)
    tie = np.abs(quotient - np.floor(quotient) - 0.5) < 1e-3
    return (difference[~tie] <= rounding[~tie]).all() and (difference <= steps * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("granularity", "size"), GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle_on_every_case(name, granularity, size, bits):
    weight = case(name)
    planned = RTN(bits, granularity, size, symmetric=False).plan(matrix_of(weight))
    groups = rtn_oracle.groups(weight.shape, granularity, size)
    wanted, steps = edits_oracle.asymmetric(weight.numpy(), bits, groups)
    assert close_to(planned, weight, wanted, steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_dtypes_and_turned_storage(dtype, symmetric):
    weight = case("heavy tails", dtype)
    edit = RTN(4, "group", 8, symmetric=symmetric)
    planned = edit.plan(matrix_of(weight))
    assert planned.dtype == dtype
    assert torch.equal(planned, edit.plan(matrix_of(turned(weight))))
    groups = rtn_oracle.groups(weight.shape, "group", 8)
    if symmetric:
        wanted, steps = rtn_oracle.round_to_nearest(weight.double().numpy(), 4, "group", 8)
    else:
        wanted, steps = edits_oracle.asymmetric(weight.double().numpy(), 4, groups)
    assert close_to(planned, weight, wanted, steps)


@pytest.mark.parametrize("name", [name for name in CASES if name != "zero"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_never_costs_accuracy_beyond_half_a_symmetric_step(name, bits):
    weight = case(name)
    edit = RTN(bits, symmetric=False)
    error = (edit.plan(matrix_of(weight)) - weight).abs()
    half = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
    assert bool((error <= torch.minimum(half, weight.abs()) * (1 + 1e-5)).all())


def test_a_skewed_row_gains_from_the_zero_point():
    weight = case("positive")
    errors = [(RTN(4, symmetric=way).plan(matrix_of(weight)) - weight).norm() for way in (False, True)]
    assert errors[0] < 0.6 * errors[1]


values = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda rows: st.lists(st.lists(values, min_size=6, max_size=6), min_size=rows, max_size=rows)
    ),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(GRIDS),
)
def test_the_contract_holds_for_any_matrix(rows, bits, symmetric, grid):
    weight = torch.tensor(rows, dtype=torch.float32)
    edit = RTN(bits, *grid, symmetric=symmetric)
    planned = edit.plan(matrix_of(weight))
    for reading in edit.kind.measure("w", weight, planned):
        assert not reading.rigorous or reading.value <= reading.limit, reading
    if symmetric:  # rounding what is rounded changes nothing
        again = edit.plan(matrix_of(planned))
        assert bool(((again - planned).abs() <= 1e-5 * weight.abs().max()).all())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_hidden(broken):
    weight = case("random")
    weight[2, 3] = broken
    planned = RTN(8, symmetric=False).plan(matrix_of(weight))
    assert not torch.isfinite(planned[2]).any()
    assert torch.isfinite(planned[[0, 1, 3]]).all()


def test_the_name_and_the_parameters_tell_the_grid():
    edit = RTN(4, "group", 32, symmetric=False)
    assert edit.name == "rtn-int4-group32-asym"
    assert edit.params()["symmetric"] is False
