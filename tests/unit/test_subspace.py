"""Scores of subspaces on planted changes with known answers, and their null against Monte Carlo."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightproof.errors import InputError
from weightproof.subspace import (
    activation_recovery,
    activation_target,
    activation_weight_gap,
    balanced,
    joint_score,
    mean_cosine,
    null_std,
    oracle_basis,
    oracle_recovery,
    orthonormal,
    percent_of_oracle,
    principal_angles,
    recovery,
    specificity,
    union,
    weight_target,
    without,
)

D, R = 64, 8


class Product(NamedTuple):
    left: Tensor
    right: Tensor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame(seed: int = 0, dim: int = D) -> Tensor:
    """A uniformly random orthogonal matrix (d, d)."""
    q, r = torch.linalg.qr(gaussian(dim, dim, seed=seed))
    return q * r.diagonal().sign()


# ---- planted changes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 2, 5, 8])
def test_a_basis_that_shares_s_of_r_directions_recovers_s_over_r_of_the_most(shared: int):
    q = frame()
    coordinates = torch.linalg.qr(gaussian(40, R, seed=1)).Q.T  # all directions of the change carry the same energy
    delta = q[:, :R] @ coordinates
    basis = torch.cat([q[:, :shared], q[:, R : 2 * R - shared]], dim=1)
    found = recovery(delta, basis)
    assert found.ratio == pytest.approx(shared / R * D / R, abs=1e-12)
    assert found.energy == pytest.approx(shared / R, abs=1e-12)


@pytest.mark.parametrize("width", [8, 64, 200])
def test_the_planted_subspace_itself_recovers_d_over_r_whatever_the_width(width: int):
    q = frame(3)
    delta = q[:, :R] @ gaussian(R, width, seed=4)
    assert recovery(delta, q[:, :R]).ratio == pytest.approx(D / R, abs=1e-10)
    assert recovery(delta, q[:, R : 2 * R]).ratio == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_energy_fraction_is_that_share_of_the_most(share: float):
    q = frame(5)
    inside, outside = q[:, :R] @ gaussian(R, 30, seed=6), q[:, R:] @ gaussian(D - R, 30, seed=7)
    delta = math.sqrt(share) * inside / inside.norm() + math.sqrt(1 - share) * outside / outside.norm()
    assert recovery(delta, q[:, :R]).ratio == pytest.approx(share * D / R, rel=1e-12)


def test_activations_in_the_subspace_recover_all_and_each_counts_once():
    q = frame(8)
    samples = gaussian(20, R, seed=9) @ q[:, :R].T
    assert activation_recovery(samples, q[:, :R]).ratio == pytest.approx(D / R, abs=1e-10)
    mixed = torch.stack([1000.0 * q[:, 0], q[:, 20], torch.zeros(D, dtype=torch.float64)])
    assert activation_recovery(mixed, q[:, :R]).energy == pytest.approx(0.5, abs=1e-12)


def test_a_factored_change_scores_as_its_product():
    left, right = gaussian(D, 3, seed=1), gaussian(3, 500, seed=2)
    whole, parts = weight_target(left @ right), weight_target(Product(left, right))
    basis = frame(4)[:, :R]
    assert parts.factor.shape == (D, 3)
    assert parts.purity == pytest.approx(whole.purity, rel=1e-12)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-12)
    assert recovery(parts, basis).ratio == pytest.approx(recovery(whole, basis).ratio, rel=1e-12)
    assert recovery(Product(left, right), basis) == recovery(parts, basis)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scores_do_not_depend_on_the_scale(scale: float):
    delta, basis = gaussian(D, 20, seed=1), frame(2)[:, :R]
    assert recovery(scale * delta, basis).ratio == pytest.approx(recovery(delta, basis).ratio, rel=1e-12)


# ---- the null -------------------------------------------------------------------------------------------------------


def test_the_null_has_the_reference_spread():
    assert null_std(R, D, purity=1.0) == pytest.approx(0.4606, abs=5e-5)  # a change of rank one
    rank_8 = weight_target(Product(frame()[:, :8], gaussian(8, 64, seed=2)))
    full = weight_target(gaussian(D, 64, seed=3))
    assert null_std(R, D, rank_8.purity) == pytest.approx(0.1646, abs=0.01)
    assert null_std(R, D, full.purity) == pytest.approx(0.0592, abs=0.006)
    assert null_std(D, D, 1.0) == 0.0


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_null_is_that_of_random_subspaces(rank: int):
    target = weight_target(Product(gaussian(D, rank, seed=rank), gaussian(rank, 64, seed=2)))
    draws = torch.linalg.qr(gaussian(2000, D, R, seed=11)).Q
    ratios = (draws.mT @ target.factor).square().sum((1, 2)) * D / R
    found = recovery(target, frame(1)[:, :R])
    assert float(ratios.mean()) == pytest.approx(1.0, abs=4 * found.null_std / math.sqrt(2000))
    assert float(ratios.std()) == pytest.approx(found.null_std, rel=0.08)
    assert found.z == pytest.approx((found.ratio - 1) / found.null_std)


def test_the_balanced_change_has_a_null_of_its_own_and_the_mean_energy():
    targets = [weight_target(1e6 * gaussian(D, 1, seed=1)), weight_target(gaussian(D, 50, seed=2))]
    both, basis = balanced(targets), frame(3)[:, :R]
    mean = sum(recovery(one, basis).ratio for one in targets) / 2
    assert recovery(both, basis).ratio == pytest.approx(mean, rel=1e-12)
    draws = torch.linalg.qr(gaussian(2000, D, R, seed=12)).Q
    ratios = (draws.mT @ both.factor).square().sum((1, 2)) * D / R
    assert float(ratios.std()) == pytest.approx(recovery(both, basis).null_std, rel=0.08)


def test_where_every_subspace_holds_the_same_there_is_no_z():
    assert recovery(torch.eye(D), frame()[:, :R]).z is None
    assert recovery(gaussian(D, 3), torch.eye(D)).z is None
    assert recovery(gaussian(D, 3), torch.eye(D)).ratio == pytest.approx(1.0)


# ---- oracles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("true_rank", "expected"), [(4, 16), (8, 8), (16, 4), (32, 2), (64, 1)])
def test_the_oracle_of_a_flat_spectrum(true_rank: int, expected: float):
    delta = frame(1)[:, :true_rank] @ frame(2)[:true_rank]
    found = oracle_recovery(weight_target(delta), R)
    assert found.ratio == pytest.approx(min(expected, D / R), rel=1e-10)
    basis = oracle_basis(delta, R)
    assert basis.shape == (D, min(R, true_rank))
    assert percent_of_oracle(recovery(delta, basis), weight_target(delta), R) == pytest.approx(100.0)


def test_the_oracle_of_the_unbalanced_concatenation_is_not_the_best_for_its_parts():
    q = frame(6)
    small, large = q[:, :8] @ gaussian(8, 20, seed=1), 100.0 * q[:, 8:16] @ gaussian(8, 20, seed=2)
    targets = [weight_target(small), weight_target(large)]
    unbalanced = oracle_basis(torch.cat([small, large], dim=1), R)
    assert recovery(small, unbalanced).ratio == pytest.approx(0.0, abs=1e-4)
    assert recovery(small, oracle_basis(small, R)).ratio == pytest.approx(8.0)
    both = balanced(targets)
    assert recovery(both, oracle_basis(both, R)).ratio > recovery(both, unbalanced).ratio + 0.3


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(1, 30), st.integers(1, 30), st.integers(0, 10_000))
def test_no_score_exceeds_its_oracle(dim: int, width: int, rank: int, seed: int):
    rank = min(rank, dim)
    targets = [
        weight_target(Product(gaussian(dim, 1 + seed % 5, seed=seed), gaussian(1 + seed % 5, width, seed=seed + 1))),
        weight_target(gaussian(dim, width, seed=seed + 2)),
        activation_target(gaussian(width, dim, seed=seed + 3)),
    ]
    leaning = gaussian(dim, rank, seed=seed + 4) + 3 * targets[0].factor[:, :1]
    basis = orthonormal(leaning)
    for target in (*targets, balanced(targets[:2])):
        found = recovery(target, basis)
        assert 0.0 <= found.ratio <= dim / basis.shape[1] + 1e-9
        assert found.ratio <= oracle_recovery(target, basis.shape[1]).ratio + 1e-9
        assert 0.0 <= percent_of_oracle(found, target, basis.shape[1]) <= 100.0 + 1e-7


# ---- subspaces ------------------------------------------------------------------------------------------------------


def test_directions_that_are_only_rounding_are_dropped():
    first = gaussian(D, 3, seed=1)
    doubled = torch.cat([first, first + 1e-9 * gaussian(D, 3, seed=2), 1e-4 * gaussian(D, 1, seed=3)], dim=1)
    assert orthonormal(doubled).shape == (D, 4)
    assert orthonormal(1e-20 * doubled).shape == (D, 4)  # relative, not absolute
    assert orthonormal(doubled, rank=2).shape == (D, 2)
    assert orthonormal(torch.zeros(D, 3)).shape == (D, 0)
    kept = orthonormal(doubled)
    assert torch.allclose(kept.T @ kept, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_what_lies_in_the_subspace_that_is_taken_out_is_gone():
    q = frame(2)
    rest = without(q[:, :R], q[:, 4:20])
    assert rest.shape == (D, 4)
    assert float((rest.T @ q[:, 4:20]).abs().max()) < 1e-12
    assert without(q[:, :R], q[:, :16]).shape == (D, 0)
    assert union(q[:, :4], q[:, 2:6]).shape == (D, 6)


def test_principal_angles_are_exact_near_zero_and_near_a_right_angle():
    q = frame(1)
    angles = torch.tensor([1e-9, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    turned = q[:, :4] * angles.cos() + q[:, 4:8] * angles.sin()
    assert torch.allclose(principal_angles(q[:, :4], turned), angles, atol=1e-12)
    assert torch.allclose(principal_angles(turned, q[:, :3]), angles[:3], atol=1e-12)
    assert mean_cosine(q[:, :4], q[:, :4]) == pytest.approx(1.0)
    assert mean_cosine(q[:, :4], q[:, :0]) is None


def test_specificity_counts_only_what_is_outside_of_the_clean_components():
    q = frame(9)
    clean = q[:, :8]
    delta = torch.cat([10 * q[:, :4] @ frame(1)[:4], q[:, 8:16] @ frame(2)[:8]], dim=1)  # mostly in clean components
    basis = q[:, [0, 1, 2, 3, 8, 9, 10, 11]]
    found = specificity(weight_target(delta), basis, clean)
    assert not isinstance(found, str)
    assert found.energy == pytest.approx(0.5, abs=1e-9)
    assert found.ratio == pytest.approx(0.5 * (D - 8) / 4, abs=1e-9)
    assert found.null_std == pytest.approx(null_std(4, D - 8, 1 / 8), rel=1e-9)
    assert "taken out" in str(specificity(weight_target(delta), q[:, :4], clean))
    assert "taken out" in str(specificity(weight_target(q[:, :4]), basis, clean))


# ---- both sides -----------------------------------------------------------------------------------------------------


def test_joint_score_and_gap_say_why_zero_has_no_logarithm():
    assert joint_score(4.0, 1.0) == pytest.approx(2.0)
    assert activation_weight_gap(4.0, 1.0) == pytest.approx(2.0)
    assert "weights is 0" in str(joint_score(4.0, 0.0))
    assert "activations is 0" in str(activation_weight_gap(0.0, 1.0))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "basis", "words"),
    [
        (torch.zeros(D, 3), frame()[:, :R], "zero"),
        (torch.full((D, 3), math.nan), frame()[:, :R], "NaN"),
        (gaussian(D, 3), 2 * frame()[:, :R], "not orthonormal"),
        (gaussian(D, 3), frame(dim=32)[:, :R], "64 numbers"),
        (gaussian(D), frame()[:, :R], "matrix"),
    ],
)
def test_what_has_no_score_is_refused(delta: Tensor, basis: Tensor, words: str):
    with pytest.raises(InputError, match=words):
        recovery(delta, basis)


def test_factors_that_do_not_fit_and_widths_that_differ_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        weight_target(Product(gaussian(D, 3), gaussian(4, 9)))
    with pytest.raises(InputError, match="one width"):
        balanced([weight_target(gaussian(8, 2)), weight_target(gaussian(9, 2))])
    with pytest.raises(InputError, match="all 3 differences"):
        activation_target(torch.zeros(3, D))
