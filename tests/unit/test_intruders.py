from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.numerics.intruders import largest_cosines, matrix_cosine, written_cosine

SHAPES = [(64, 90), (90, 64), (72, 72)]


def frame(height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(height, width, generator=generator, dtype=torch.float64)).Q


def learned(shape: tuple[int, int], rank: int = 12, noise: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of `rank` well separated directions over noise, and these."""
    height, width = shape
    u, v = frame(height, rank, 1), frame(width, rank, 2)
    strengths = torch.linspace(12, 4, rank, dtype=torch.float64)
    bulk = noise * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return u @ torch.diag(strengths) @ v.T + bulk / math.sqrt(width), u, v


def slow_cosines(before: Tensor, after: Tensor, top: int) -> list[float]:
    """By whole decompositions of both, one pair of vectors after the other, near ties summed."""
    u, s, _ = torch.linalg.svd(before, full_matrices=False)
    new = torch.linalg.svd(after, full_matrices=False).U[:, :top]
    found = []
    for column in range(new.shape[1]):
        best = 0.0
        for first in range(len(s)):
            if s[first] < 1e-6 * s[0]:
                continue
            mass = 0.0
            for other in range(first, len(s)):
                if s[other] >= s[first] * 0.99 and s[other] >= 1e-6 * s[0]:
                    mass += float(u[:, other] @ new[:, column]) ** 2
            best = max(best, math.sqrt(mass))
        found.append(best)
    return found


def outside(u: Tensor, count: int, seed: int = 5) -> Tensor:
    """Directions orthogonal to those of `u`."""
    drawn = torch.randn(u.shape[0], count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn - u @ (u.T @ drawn)).Q


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_are_those_of_whole_decompositions(shape):
    before, u, _ = learned(shape, noise=1.0)
    change = 9.0 * outside(u, 2) @ frame(shape[1], 2, 6).T + 0.5 * u[:, :3] @ frame(shape[1], 3, 7).T
    found = largest_cosines(before, before + change, 10)
    assert found.method == "exact, float64"
    assert found.values == pytest.approx(slow_cosines(before, before + change, 10), abs=1e-7)


@pytest.mark.parametrize("exact_side", [1024, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_intruder_has_a_cosine_near_zero(shape, exact_side):
    before, u, v = learned(shape, noise=0.0)
    change = 20.0 * outside(u, 1) @ outside(v, 1, 8).T
    values = largest_cosines(before, before + change, 10, exact_side=exact_side).values
    assert values[0] < 0.05
    assert min(values[1:]) > 0.9
    same = before + 6.0 * u[:, 4:5] @ v[:, 4:5].T  # stronger than the strongest, and as old
    assert min(largest_cosines(before, same, 10, exact_side=exact_side).values) > 1 - 1e-6


@pytest.mark.parametrize("exact_side", [1024, 1])
def test_a_change_within_what_was_there_brings_no_intruder(exact_side):
    before, u, v = learned((128, 160))
    generator = torch.Generator().manual_seed(9)
    small = 0.1 * torch.randn(12, 12, generator=generator, dtype=torch.float64)
    change = u @ small @ v.T
    assert min(largest_cosines(before, before + change, 10, exact_side=exact_side).values) > 0.9
    assert min(largest_cosines(before, 3.0 * before, 10, exact_side=exact_side).values) > 1 - 1e-6
    assert min(largest_cosines(before, -before, 10, exact_side=exact_side).values) > 1 - 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [3.0, 6.0, 20.0])
def test_without_decomposing_it_the_verdicts_are_the_same(shape, strength):
    before, u, _ = learned(shape, noise=1.0)
    change = strength * outside(u, 3) @ frame(shape[1], 3, 6).T + 2.0 * u[:, :2] @ frame(shape[1], 2, 7).T
    expected = slow_cosines(before, before + change, 10)
    found = largest_cosines(before, before + change, 10, exact_side=1)
    assert found.method == "krylov-6, lanczos-48, float64"
    for value, slow in zip(found.values, expected, strict=False):
        assert slow - 0.05 <= value <= slow + 0.15
    # What is far from the limit on one side is so on the other.
    assert [v < 0.5 for v in found.values if abs(v - 0.5) > 0.15] == [
        s < 0.5 for v, s in zip(found.values, expected, strict=False) if abs(v - 0.5) > 0.15
    ]


def test_vectors_that_cannot_be_told_from_their_neighbours_are_left_out():
    """The spectrum of noise has no gaps: a Krylov space settles the planted ones alone."""
    before, _, _ = learned((1100, 1200), rank=3, noise=1.0)
    found = largest_cosines(before, before, 10)
    assert found.method.startswith("krylov")
    assert 3 <= len(found.values) < 10
    assert min(found.values[:3]) > 1 - 1e-4


def test_equal_singular_values_are_one_direction():
    u, v = frame(40, 6, 1), frame(50, 6, 2)
    before = u @ v.T  # all six alike: any rotation of them is as good
    turned = u @ frame(6, 6, 3) @ torch.diag(torch.linspace(6, 1, 6, dtype=torch.float64)) @ frame(6, 6, 4).T @ v.T
    for exact_side in (1024, 1):
        assert min(largest_cosines(before, turned, 6, exact_side=exact_side).values) > 1 - 1e-6


def test_directions_that_had_no_strength_do_not_count_as_there():
    """Null vectors of a matrix of low rank are no directions of it."""
    u, v = frame(40, 4, 1), frame(50, 4, 2)
    before = u @ v.T
    for exact_side in (1024, 1):
        after = before + 5.0 * outside(u, 1) @ frame(50, 1, 3).T
        assert largest_cosines(before, after, 1, exact_side=exact_side).values[0] < 0.1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_and_dtype_do_not_matter(scale):
    before, u, _ = learned((64, 80), noise=1.0)
    after = before + 9.0 * outside(u, 1) @ frame(80, 1, 6).T
    expected = largest_cosines(before, after, 8).values
    small = largest_cosines((scale * before).float(), (scale * after).float(), 8).values
    assert small == pytest.approx(expected, abs=1e-3)
    rounded = largest_cosines(before.bfloat16(), after.bfloat16(), 4).values
    assert rounded == pytest.approx(expected[:4], abs=0.05)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.ones(3, 4), torch.ones(4, 3), r"changed its shape from \[3, 4\] to \[4, 3\]"),
        (torch.ones(3, 4), torch.full((3, 4), torch.nan), "NaN or inf"),
        (torch.zeros(3, 4), torch.ones(3, 4), "it is zero"),
    ],
)
def test_what_has_no_directions_is_refused(before, after, message):
    with pytest.raises(InputError, match=message):
        largest_cosines(before, after, 2)


def test_one_row_and_one_column():
    row, column = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    assert largest_cosines(row, row.flip(1), 10).values == (1.0,)
    assert largest_cosines(column, column.flip(0), 10).values[0] == pytest.approx(0.0, abs=1e-12)


def test_how_far_a_change_writes_into_directions():
    basis = frame(30, 3, 1)
    inside = basis @ torch.randn(3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    across = outside(basis, 4) @ torch.ones(4, 20, dtype=torch.float64)
    assert written_cosine(inside, basis) == pytest.approx(1.0)
    assert written_cosine(across, basis) == pytest.approx(0.0, abs=1e-12)
    both = inside / inside.norm() * 0.6 + across / across.norm() * 0.8
    assert written_cosine(both, basis) == pytest.approx(0.6)
    assert written_cosine(torch.zeros(30, 20), basis) == 0.0
    generator = torch.Generator().manual_seed(4)
    drawn = [written_cosine(torch.randn(30, 20, generator=generator), basis) ** 2 for _ in range(200)]
    assert sum(drawn) / 200 == pytest.approx(3 / 30, rel=0.05)


def test_cosine_of_two_changes():
    one, other = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert matrix_cosine(one, other) == pytest.approx(0.6)
    assert matrix_cosine(one, -other) == pytest.approx(-0.6)
    assert matrix_cosine(one, torch.zeros(2, 2)) == 0.0
