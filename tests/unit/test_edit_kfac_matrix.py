"""Keeping the directions of most curvature, held against a sort of all pairs in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import pytest
import torch
from torch_memory import peak_bytes

from weightproof.curvature import Factor, bases
from weightproof.curvature.eigenbasis import Eigenbasis, EigenbasisCache, eigenbasis
from weightproof.curvature.mask import ragged, staircase
from weightproof.curvature.projection import FactorBases, project
from weightproof.edits.kfac import edit_matrix
from weightproof.errors import InputError

W = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
G1, A1 = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.diag(torch.tensor([3.0, 1.0])).double()
G2 = torch.diag(torch.tensor([2.0, 1.0])).double()
A2 = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def oracle(weight, activation, gradient, energy, formula="original"):
    """Every pair sorted, in float64; ties (relative 1e-9 here, far from any gap of the cases) together."""
    lam, left = torch.linalg.eigh(gradient.double())
    mu, right = torch.linalg.eigh(activation.double())
    coefficients = left.T @ weight.double() @ right
    saliency = lam[:, None].clamp(min=0) * mu.clamp(min=0)
    if formula == "modified":
        saliency = saliency * coefficients**2
    values = saliency.flatten().sort(descending=True).values
    mass = values.cumsum(0)
    place = int((mass < energy * values.sum() * (1 - 1e-12)).sum())
    threshold = values[min(place, len(values) - 1)] * (1 - 1e-9) if energy > 0 else math.inf
    return left @ torch.where(saliency >= threshold, coefficients, 0.0) @ right.T


def covariance(n: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.arange(1, n + 1, dtype=torch.float64) ** -decay) @ basis.T


def case(seed: int, p: int = 7, q: int = 11):
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(p, q, generator=generator, dtype=torch.float64)
    return weight, covariance(q, seed, 0.7), covariance(p, seed + 50, 1.3)


@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        (0.3, [[1, 0], [0, 0]]), (0.6, [[1, 0], [0, 0]]), (0.61, [[1, 2], [0, 0]]), (0.8, [[1, 2], [0, 0]]),
        (0.81, [[1, 2], [3, 0]]), (0.95, [[1, 2], [3, 0]]), (0.96, [[1, 2], [3, 4]]), (1.0, [[1, 2], [3, 4]]),
        (0.0, [[0, 0], [0, 0]]),
    ],
)  # fmt: skip
def test_diagonal_factors_by_hand(energy, expected):
    found = edit_matrix(W, A1, G1, energy)
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-14)


@pytest.mark.parametrize(
    ("energy", "expected"),
    [(0.38, [[0, 0], [3, 0]]), (0.381, [[0, 2], [3, 4]]), (0.83, [[0, 2], [3, 4]]), (0.832, [[1, 2], [3, 4]])],
)
def test_the_modified_saliency_by_hand_keeps_ties_together(energy, expected):
    found = edit_matrix(W, A1, G1, energy, formula="modified")
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-14)


@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        (0.5, [[1.5, 1.5], [0, 0]]), (0.75, [[1.5, 1.5], [3.5, 3.5]]), (0.76, [[1, 2], [3.5, 3.5]]),
        (11 / 12, [[1, 2], [3.5, 3.5]]), (0.92, [[1, 2], [3, 4]]),
    ],
)  # fmt: skip
def test_rotated_factors_by_hand(energy, expected):
    found = edit_matrix(W, A2, G2, energy)
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-14)


@pytest.mark.parametrize("formula", ["original", "modified"])
@pytest.mark.parametrize("energy", [0.05, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_equals_the_sort_of_all_pairs(energy, formula):
    for seed in range(8):
        arguments = case(seed)
        found = edit_matrix(*arguments, energy, formula)
        assert torch.allclose(found, oracle(*arguments, energy, formula), atol=1e-12), seed


def test_everything_kept_is_the_same_bits_in_any_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight, activation, gradient = case(0)
        weight = weight.to(dtype)
        found = edit_matrix(weight, activation, gradient, 1.0)
        assert torch.equal(found, weight)
        assert found.dtype == dtype
        assert found.data_ptr() != weight.data_ptr()


def test_a_spectrum_whose_float32_sum_reaches_the_whole_early_loses_nothing_at_one():
    values = torch.arange(1, 513, dtype=torch.float64) ** -2.0
    found = staircase(values, values, 1.0)
    assert found.kept_pairs == 512 * 512
    nearly = staircase(values, values, 1 - 1e-6)
    products = (values[:, None] * values).flatten().sort(descending=True).values
    mass = products.cumsum(0)
    least = products[int((mass < (1 - 1e-6) * mass[-1]).sum())]
    assert nearly.kept_pairs == int((products >= least * (1 - 1e-12)).sum())


def test_factors_of_identity_keep_all_for_any_energy():
    weight, _, _ = case(1, 6, 6)
    for energy in (1e-9, 0.5, 0.999):
        assert torch.equal(edit_matrix(weight, torch.eye(6), torch.eye(6), energy), weight)


def differs(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest weight."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("seed", range(4))
def test_projection_laws(seed):
    weight, activation, gradient = case(seed)
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def edit(matrix, a=activation, g=gradient):
        return edit_matrix(matrix, a, g, 0.7)

    once = edit(weight)
    assert differs(edit(once), once) < 1e-14
    assert differs(edit(2 * weight - 3 * other), 2 * once - 3 * edit(other)) < 1e-14
    assert differs(edit(weight, activation * 1e6, gradient * 1e-9), once) < 1e-14
    norms = weight.square().sum(), once.square().sum() + (weight - once).square().sum()
    assert torch.allclose(*norms, rtol=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_equivariant_under_rotations_of_inputs_and_outputs(seed):
    weight, activation, gradient = case(seed)
    p, q = (torch.linalg.qr(covariance(n, 9 + n))[0] for n in weight.shape)
    turned = edit_matrix(p @ weight @ q.T, q @ activation @ q.T, p @ gradient @ p.T, 0.8)
    assert differs(turned, p @ edit_matrix(weight, activation, gradient, 0.8) @ q.T) < 1e-14


def test_the_mask_is_a_minimal_nested_staircase():
    generator = torch.Generator().manual_seed(4)
    for trial in range(60):
        p, q = (int(n) for n in torch.randint(1, 9, (2,), generator=generator))
        # Small whole numbers: many exact ties, and zeros.
        lam, mu = (torch.randint(0, 5, (n,), generator=generator).double().sort(descending=True).values for n in (p, q))
        products = lam[:, None] * mu
        total, before = float(products.sum()), torch.zeros(p, dtype=torch.int64)
        if total == 0:
            continue
        for energy in (0.1, 0.25, 0.5, 0.75, 0.9, 0.999):
            mask = staircase(lam, mu, energy)
            assert (mask.counts.diff() <= 0).all()
            assert (mask.counts >= before).all(), "nested"
            before = mask.counts
            kept = torch.arange(q) < mask.counts[:, None]
            mass = float(products[kept].sum())
            assert mass >= energy * total * (1 - 1e-11)
            least = products[kept].min()
            assert mass - float(products[kept & (products == least)].sum()) < energy * total, trial
            assert not (products[~kept] >= least * (1 - 1e-13)).any(), "ties together"
            assert mask.kept_mass == pytest.approx(mass / total)


@pytest.mark.parametrize(("gap", "together"), [(0.0, True), (5e-13, True), (1e-11, False), (1e-9, False)])
def test_curvatures_are_ties_to_a_relative_1e_12(gap, together):
    """At every scale: eigenvalues in float64 carry rounding of that order."""
    for scale in (1e-200, 1.0, 1e200):
        lam = torch.tensor([2.0, 1.0 + gap, 1.0, 0.5], dtype=torch.float64) * scale
        mask = staircase(lam, torch.ones(1, dtype=torch.float64), 0.6)
        # 2 and 1 of 4.5 reach 0.6; the third goes with the second where they are ties.
        assert mask.counts.tolist() == [1, 1, int(together), 0]
        saliencies = lam.clone()
        assert ragged(lambda values=saliencies: iter([values]), 0.6).kept_pairs == 2 + together


def test_digits_find_the_threshold_of_a_sort():
    generator = torch.Generator().manual_seed(5)
    for trial, energy in itertools.product(range(20), (0.01, 0.5, 0.9, 0.99999)):
        values = torch.randn(400, generator=generator, dtype=torch.float64).square() * 10.0 ** (trial - 10)
        values[: trial * 5] = 0.0
        found = ragged(lambda values=values: iter(values.split(37)), energy)
        ordered = values.sort(descending=True).values
        place = int((ordered.cumsum(0) < energy * ordered.sum() * (1 - 1e-12)).sum())
        assert found.kept_pairs == place + 1
        assert found.kept_mass >= energy * (1 - 1e-11)


def test_corrected_eigenvalues_rank_by_themselves():
    weight, activation, gradient = case(6)
    left, right = eigenbasis(gradient), eigenbasis(activation)
    products = left.values[:, None] * right.values
    as_products, _ = project(weight, FactorBases(left, right, products), 0.8, "ekfac")
    assert torch.allclose(as_products, edit_matrix(weight, activation, gradient, 0.8), atol=1e-13)
    only_one = torch.zeros_like(products)
    only_one[2, 3] = 1.0
    found, mask = project(weight, FactorBases(left, right, only_one), 0.5, "ekfac")
    u, v = left.vectors[:, 2], right.vectors[:, 3]
    assert mask.kept_pairs == 1
    assert torch.allclose(found, torch.outer(u, v) * (u @ weight @ v), atol=1e-13)
    with pytest.raises(InputError, match="factors fit --ekfac"):
        project(weight, FactorBases(left, right), 0.5, "ekfac")


def test_no_curvature_removes_nothing_and_says_so(caplog):
    weight, _, _ = case(7)
    found = edit_matrix(weight, torch.zeros(11, 11), torch.zeros(7, 7), 0.5)
    assert torch.equal(found, weight)
    assert "no curvature" in caplog.text


@pytest.mark.parametrize("energy", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_energy_out_of_range_is_refused(energy):
    with pytest.raises(InputError, match="energy"):
        edit_matrix(W, A1, G1, energy)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"activation_covariance": torch.eye(3)}, r"activation covariance has shape \[3, 3\], the weights need \[2"),
        ({"gradient_covariance": torch.full((2, 2), math.nan)}, "gradient covariance holds NaN"),
        ({"gradient_covariance": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
        ({"activation_covariance": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "eigenvalue of -1"),
        ({"activation_covariance": torch.diag(torch.tensor([1.0, -1.0]))}, "negative numbers on its diagonal"),
        ({"activation_covariance": torch.eye(2).long()}, "int64"),
        ({"weight": W[0]}, "matrix"),
        ({"weight": W * math.nan}, "NaN"),
        ({"formula": "Original"}, "'original' or 'modified'"),
        ({"formula": "ekfac"}, "KFAC"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(broken, message):
    given = {"weight": W, "activation_covariance": A1, "gradient_covariance": G1, "energy": 0.5} | broken
    with pytest.raises(InputError, match=message):
        edit_matrix(**given)


@pytest.mark.parametrize(("formula", "energy"), [("original", 0.9), ("original", 0.99999), ("modified", 0.9)])
def test_an_edit_takes_three_matrices_at_most(formula, energy):
    """In float64, with the result: beside the weights and the eigenbases, which were there before."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 768, generator=generator)
    bases = FactorBases(
        *(
            Eigenbasis(
                torch.arange(1, n + 1, dtype=torch.float64) ** -1.0,
                torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.double(),
                1.0,
            )
            for n in weight.shape
        )
    )
    assert peak_bytes(lambda: torch.empty(1000)) == pytest.approx(4000, abs=64), "allocations are seen"
    found = peak_bytes(lambda: project(weight, bases, energy, formula))
    assert 2 * weight.nbytes < found < 3.01 * weight.nbytes


def test_the_mask_of_a_large_matrix_needs_no_array_of_its_size():
    lam, mu = (torch.arange(1, n + 1, dtype=torch.float64) ** -power for n, power in ((11008, 1.1), (4096, 0.8)))
    assert peak_bytes(lambda: staircase(lam, mu, 0.6)) < 11008 * 4096 / 50
    found = staircase(lam, mu, 0.6)
    assert 0 < found.kept_pairs < 11008 * 4096
    begin = time.process_time()
    for _ in range(5):
        staircase(lam, mu, 0.6)
    # 8 ms on an idle core; the limit is 50.
    assert (time.process_time() - begin) / 5 < 0.05


def test_decompositions_are_kept_by_digest_within_a_budget():
    made = []

    def make(name):
        made.append(name)
        return Eigenbasis(torch.zeros(4), torch.zeros(4, 4), 0.0)

    cache = EigenbasisCache(max_bytes=200)
    for name in ("a", "b", "a", "c", "a", "b"):
        cache.get(name, lambda name=name: make(name))
    assert made == ["a", "b", "c", "b"]


def test_one_decomposition_serves_all_matrices_that_read_one_input(monkeypatch):
    activation, gradients = covariance(5, 1), [covariance(4, 2), covariance(4, 3)]
    factors = [Factor(f"{i}.weight", activation * 30, one * 30, 30) for i, one in enumerate(gradients)]
    made = []
    monkeypatch.setattr(bases, "_KEPT", EigenbasisCache())
    monkeypatch.setattr(bases, "eigenbasis", lambda factor, what: made.append(what) or eigenbasis(factor, what))
    first, second = map(bases.bases_of, factors)
    assert made == ["G of 0.weight", "A of 0.weight", "G of 1.weight"]
    assert first.activation is second.activation
    assert torch.allclose(first.activation.values, eigenbasis(activation).values, rtol=1e-12)
    more = dataclasses.replace(factors[0], tokens=60)
    assert torch.allclose(2 * bases.bases_of(more).activation.values, first.activation.values, rtol=1e-12)
