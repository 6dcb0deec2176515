"""Truncation against a full decomposition, and the contract of low rank: exact at both ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from edit_cases import CASES, case, matrix_of, oracle, turned
from hypothesis import given, settings
from hypothesis import strategies as st

from weightproof.edits import SVD, Edit
from weightproof.errors import InputError
from weightproof.numerics.low_rank import LowRank
from weightproof.types import ContractReading

slow = oracle("edits")


def residual(weight, other):
    return np.linalg.norm(weight.double().numpy() - np.asarray(other, dtype=np.float64))


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_full_decomposition(name, rank):
    weight = case(name)
    planned = SVD(rank=rank).plan(matrix_of(weight))
    if rank >= min(weight.shape):
        assert planned is None
        return
    wanted = slow.truncated(weight.numpy(), rank)
    size = float(weight.double().norm())
    # Where two singular values at the cut are equal the subspace is free: compare what it costs.
    assert abs(residual(weight, planned.numpy()) - residual(weight, wanted)) <= 3e-7 * size
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    if values[rank - 1] - values[rank] > 1e-3 * values[0]:
        assert np.linalg.norm(planned.double().numpy() - wanted) <= 1e-6 * size
    assert torch.equal(planned, SVD(rank=rank).plan(matrix_of(turned(weight))))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["random", "spiked", "low rank", "heavy tails", "tall", "zero", "huge", "tiny"])
def test_energy_takes_the_smallest_rank_that_reaches_it(name, energy):
    weight = case(name, torch.float64)
    planned = SVD(energy=energy).plan(matrix_of(weight))
    rank = slow.rank_for(weight.numpy(), energy)
    if rank == min(weight.shape):
        assert planned is None
        return
    scale = float(weight.abs().max()) or 1.0
    assert np.linalg.matrix_rank((planned / scale).numpy(), tol=1e-6 * float((weight / scale).norm())) == rank
    left = float(((weight - planned) / scale).norm()) ** 2
    assert left <= (1 - energy) * float((weight / scale).norm()) ** 2 * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("edit", [SVD(rank=4), SVD(energy=0.8)], ids=lambda edit: edit.name)
@pytest.mark.parametrize("name", ["random", "spiked", "low rank", "heavy tails", "tall", "zero", "ties"])
def test_the_contract_holds_in_every_dtype(name, edit, dtype):
    weight = case(name, dtype)
    planned = edit.plan(matrix_of(weight))
    assert planned.dtype == dtype
    readings = edit.kind.measure("w", weight, planned)
    assert [one.statistic for one in readings] == ["tail_over_rounding", "error_over_tail"]
    assert all(one.rigorous and one.value <= one.limit for one in readings), readings


DAMAGE = {
    "scaled": lambda planned, _: 1.01 * planned,
    "sign": lambda planned, _: -planned,
    "one element": lambda planned, _: planned + 0.05 * torch.eye(*planned.shape),
    "rows shuffled": lambda planned, _: planned.flip(0),
    "not truncated": lambda _, weight: weight,
    "one component too many": lambda _, weight: SVD(rank=5).plan(matrix_of(weight)),
    "one component too few": lambda _, weight: SVD(rank=3).plan(matrix_of(weight)),
    "NaN": lambda planned, _: planned * float("nan"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_contract_catches_damage(name):
    weight = case("random")
    damaged = DAMAGE[name](SVD(rank=4).plan(matrix_of(weight)), weight)
    readings = LowRank(rank=4).measure("w", weight, damaged)
    assert any(one.value > one.limit for one in readings), readings


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 10_000), st.sampled_from([0.3, 0.7, 0.95, 1.0]))
def test_any_shape_keeps_the_contract(rows, cols, seed, energy):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    edit = SVD(energy=energy)
    planned = edit.plan(matrix_of(weight))
    readings = edit.kind.measure("w", weight, weight if planned is None else planned)
    assert all(one.value <= one.limit for one in readings), readings


def test_what_cannot_be_compared_is_not_measured():
    kind = LowRank(rank=2)
    (first, second) = kind.measure("w", torch.ones(3, 4), torch.ones(4, 3))
    assert first.value is None
    assert "shape changed" in second.reason
    assert isinstance(first, ContractReading)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_matrix_without_singular_values_is_named(broken):
    weight = case("random")
    weight[1, 1] = broken
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight cannot be truncated: it holds NaN or inf"):
        SVD(rank=2).plan(matrix_of(weight))


BAD = [
    ({}, "either rank= or energy="),
    ({"rank": 2, "energy": 0.5}, "either rank= or energy="),
    ({"rank": 0}, "from 1"),
    ({"rank": 2.0}, "whole number"),
    ({"energy": 1.5}, "share above 0"),
    ({"energy": 90}, "not percent"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_parameters_are_refused_in_words(arguments, words):
    with pytest.raises(InputError, match=words):
        SVD(**arguments)


def test_it_is_an_edit():
    edit = SVD(rank=4, exclude="attn")
    assert isinstance(edit, Edit)
    assert edit.params() == {"rank": 4, "energy": None, "include": ["*"], "exclude": ["attn"]}
    assert edit.kind.params() == {"rank": 4, "energy": None}
