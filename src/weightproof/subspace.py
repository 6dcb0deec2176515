"""How much of a change of weights, or of activations, lies in a subspace of the residual stream: pure numerics.

The change of a matrix that writes to the stream is M (d, n); that of activations is a set of vectors x. For an
orthonormal basis B (d, r) the recovered energy is ||B'M||_F^2 / ||M||_F^2 (the mean of ||B'x||^2 / ||x||^2), and the
ratio R is this over r / d, what a random subspace holds on average: R is 1 by chance and d / r at most.

Everything depends on the change only through S = M M' / ||M||_F^2. For a uniformly random r-dimensional projector P,
E tr(PS) = r / d and Var tr(PS) = 2 r (d - r) / (d (d - 1) (d + 2)) (tr S^2 - 1 / d): the null of R is known in closed
form, with mean 1 exactly. The best any subspace of r dimensions can do is the sum of the r largest eigenvalues of S.

>>> import torch
>>> basis = torch.eye(64)[:, :8]
>>> recovery(basis @ torch.ones(8, 3), basis).ratio
8.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weightproof.errors import InputError

RELATIVE_TOLERANCE = 1e-6
"""Singular values below this share of the largest are not directions but rounding, of float32 inputs."""
_ORTHONORMAL = 1e-6
_NOTHING = 1e-12
_ZERO = "the change is zero: no share of it lies anywhere"


class ZeroChangeError(InputError):
    """There is no change of which a share could lie anywhere."""


class Factored(Protocol):
    """A matrix kept as a product: `left` (d, r) times `right` (r, n)."""

    @property
    def left(self) -> Tensor:
        """(d, r)."""
        ...

    @property
    def right(self) -> Tensor:
        """(r, n)."""
        ...


@dataclass(frozen=True)
class Recovery:
    """How much of a change lies in a subspace.

    Attributes:
        ratio: R: energy over r / d; 1 by chance, at most d / r.
        null_std: Standard deviation of R over random subspaces of the same dimension.
        z: (R - 1) / null_std; None where every subspace of that dimension holds the same, and chance says nothing.
        energy: Share of the squared norm of the change that lies in the subspace, 0 to 1.
    """

    ratio: float
    null_std: float
    z: float | None
    energy: float


@dataclass(frozen=True, eq=False)
class Target:
    """A change, reduced to what scores depend on.

    Attributes:
        factor: (d, k) float64 of unit Frobenius norm with factor factor' = S; k is at most the rank of the change.
        purity: tr S^2: 1 for a change of rank one, 1 / d for one that has no direction.
        norm: Frobenius norm of the change itself; for activations, the root mean square of their norms.
    """

    factor: Tensor
    purity: float
    norm: float

    @property
    def dim(self) -> int:
        """D, the width of the stream."""
        return self.factor.shape[0]


# ---------------------------------------------------------------- what is scored


@torch.no_grad()
def weight_target(delta: Tensor | Factored) -> Target:
    """The change of one matrix, (d, n) or factored, seen from the side that writes to the stream.

    Of a product only the factors are touched, and of a wide matrix only the triangle of its QR decomposition is kept.

    Raises:
        ZeroChangeError: The change is zero; of a product, up to the rounding of its factors.
        InputError: It holds NaN or inf, or is no matrix.
    """
    if isinstance(delta, Tensor):
        return _target(_triangle(_matrix(delta)))
    left, right = _matrix(delta.left), _matrix(delta.right)
    if left.shape[1] != right.shape[0]:
        raise InputError(f"the factors {list(left.shape)} and {list(right.shape)} of a change do not fit together")
    product = left @ _triangle(right)
    sizes = float(torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right))
    if float(torch.linalg.vector_norm(product)) <= _NOTHING * sizes:  # two sides that are the same cancel
        raise ZeroChangeError(_ZERO)
    return _target(_triangle(product))


def _triangle(matrix: Tensor) -> Tensor:
    """A matrix N of at most as many columns as rows with N N' = M M'."""
    if matrix.shape[1] <= matrix.shape[0]:
        return matrix
    return torch.linalg.qr(matrix.T, mode="r").R.T


@torch.no_grad()
def activation_target(samples: Tensor) -> Target:
    """Differences of activations, (n, d), each counted once whatever its length; zero ones are left out.

    Raises:
        ZeroChangeError: All are zero.
        InputError: One holds NaN or inf.
    """
    rows = _matrix(samples)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if not bool((lengths > 0).any()):
        raise ZeroChangeError(f"all {len(rows)} differences of activations are zero: the change does nothing there")
    kept = rows[lengths > 0] / lengths[lengths > 0, None]
    norm = float(lengths.square().mean().sqrt())
    found = _target(_triangle(kept.T / math.sqrt(len(kept))))
    return Target(found.factor, found.purity, norm)


def balanced(targets: Sequence[Target]) -> Target:
    """Several matrices as one in which each counts the same: the concatenation of M_t / ||M_t||_F.

    Its energy in any subspace is the mean of theirs, and it has a null of its own.

    Raises:
        InputError: There is none, or they are of different width.
    """
    if not targets or len({one.dim for one in targets}) != 1:
        widths = sorted({one.dim for one in targets})
        raise InputError(f"changes of one width are needed to balance them, not {widths or 'none'}")
    joined = torch.cat([one.factor for one in targets], dim=1) / math.sqrt(len(targets))
    found = _target(_triangle(joined))
    return Target(found.factor, found.purity, math.sqrt(sum(one.norm**2 for one in targets)))


def _matrix(values: Tensor) -> Tensor:
    if values.ndim != 2 or not values.is_floating_point():
        raise InputError(f"a matrix of floating point numbers is needed, not {values.dtype} {list(values.shape)}")
    work = values.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(work).all()):
        raise InputError("it holds NaN or inf: no share of it lies anywhere")
    return work


def _target(matrix: Tensor) -> Target:
    peak = float(matrix.abs().max()) if matrix.numel() else 0.0
    if peak == 0.0:
        raise ZeroChangeError(_ZERO)
    scaled = matrix / peak  # squares of huge or tiny entries would leave float64
    norm = float(torch.linalg.vector_norm(scaled))
    unit = scaled / norm
    return Target(unit, float((unit.T @ unit).square().sum()), norm * peak)


# ---------------------------------------------------------------- scores


def recovery(delta: Tensor | Factored | Target, basis: Tensor) -> Recovery:
    """The share of a change that lies in a subspace, against chance.

    Args:
        delta: The change (d, n) of a matrix that writes to the stream, factored or not, or a `Target`.
        basis: (d, r), orthonormal.

    Raises:
        InputError: The change is zero or not finite, the basis not orthonormal, or they differ in width.
    """
    target = delta if isinstance(delta, Target) else weight_target(delta)
    basis = _checked(basis, target.dim)
    energy = float((basis.T @ target.factor).square().sum())
    return recovery_of(energy, basis.shape[1], target.dim, target.purity)


def activation_recovery(samples: Tensor, basis: Tensor) -> Recovery:
    """The mean share of differences of activations, (n, d), that lies in a subspace, against chance."""
    return recovery(activation_target(samples), basis)


def recovery_of(energy: float, rank: int, dim: int, purity: float) -> Recovery:
    """Ratio, null and z of an energy in `rank` of `dim` dimensions, for a change of that purity (tr S^2)."""
    energy = min(1.0, max(0.0, energy))
    ratio, deviation = energy * dim / rank, null_std(rank, dim, purity)
    return Recovery(ratio, deviation, (ratio - 1.0) / deviation if deviation > _NOTHING else None, energy)


def null_std(rank: int, dim: int, purity: float) -> float:
    """Standard deviation of R over uniformly random subspaces, exactly; 0 where all of them hold the same.

    Args:
        rank: r, dimensions of the subspace.
        dim: d, dimensions of the space.
        purity: tr S^2 of the change.
    """
    if rank >= dim or dim < 2:
        return 0.0
    spread = max(0.0, purity - 1.0 / dim)
    variance = 2.0 * rank * (dim - rank) / (dim * (dim - 1.0) * (dim + 2.0)) * spread
    return dim / rank * math.sqrt(variance)


def specificity(target: Target, basis: Tensor, removed: Tensor) -> Recovery | str:
    """The recovery in what is left when the directions of `removed` are taken out of both change and basis.

    Ratio and null are those of the d - k dimensions that are left. As text, why there is none.

    Args:
        target: The change.
        basis: (d, r), orthonormal.
        removed: (d, k), orthonormal: directions that matter to the base model anyhow.
    """
    basis, removed = _checked(basis, target.dim), _checked(removed, target.dim)
    rest = without(basis, removed)
    left = target.factor - removed @ (removed.T @ target.factor)
    if rest.shape[1] == 0:
        return f"all of it lies in the {removed.shape[1]} directions that are taken out"
    if float(left.square().sum()) <= _NOTHING:
        return f"the change lies in the {removed.shape[1]} directions that are taken out"
    found = _target(left)
    energy = float((rest.T @ found.factor).square().sum())
    return recovery_of(energy, rest.shape[1], target.dim - removed.shape[1], found.purity)


# ---------------------------------------------------------------- oracles


def oracle_basis(delta: Tensor | Factored | Target, rank: int) -> Tensor:
    """The subspace that holds the most of a change: its leading left singular vectors, (d, <= rank).

    Fewer columns than `rank` where the change has fewer dimensions. For several matrices: of `balanced`.
    """
    target = delta if isinstance(delta, Target) else weight_target(delta)
    return orthonormal(target.factor, rank)


def oracle_recovery(target: Target, rank: int) -> Recovery:
    """What the best subspace of `rank` dimensions holds: R = d / r exactly for a change of at most that rank."""
    values = torch.linalg.svdvals(target.factor)[:rank]
    return recovery_of(float(values.square().sum()), min(rank, target.dim), target.dim, target.purity)


def percent_of_oracle(found: Recovery, target: Target, rank: int) -> float:
    """100 times what a basis of `rank` columns recovers over the most that as many columns can."""
    return 100.0 * found.energy / oracle_recovery(target, rank).energy


# ---------------------------------------------------------------- subspaces


@torch.no_grad()
def orthonormal(
    columns: Tensor, rank: int | None = None, rtol: float = RELATIVE_TOLERANCE, scale: float | None = None
) -> Tensor:
    """The leading directions of a set of columns, by singular value; none that is only rounding.

    Args:
        columns: (d, n), in any relation to one another.
        rank: Keep at most as many; None for all.
        rtol: Directions whose singular value is below this share of `scale` are dropped.
        scale: What singular values are compared with; None for the largest of them.

    Returns:
        (d, <= rank) float64, orthonormal, strongest first; the sign of each column makes its largest entry positive.
    """
    work = _matrix(columns)
    peak = float(work.abs().max()) if work.numel() else 0.0
    if peak == 0.0:
        return work.new_zeros(work.shape[0], 0)
    vectors, values, _ = torch.linalg.svd(work / peak, full_matrices=False)
    least = rtol * (float(values[0]) if scale is None else scale / peak)
    count = int((values > least).sum())
    return signed(vectors[:, : count if rank is None else min(rank, count)])


def signed(vectors: Tensor) -> Tensor:
    """Columns with the sign that makes the largest entry of each positive: the same on every machine."""
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def without(basis: Tensor, removed: Tensor, rank: int | None = None) -> Tensor:
    """What is left of the columns of an orthonormal basis when a subspace is projected out, (d, <= rank).

    A column that lies in the subspace up to rounding is gone.
    """
    basis, removed = _matrix(basis), _matrix(removed)
    rest = basis - removed @ (removed.T @ basis)
    rest = rest - removed @ (removed.T @ rest)  # once more: cancellation leaves a part of it
    return orthonormal(rest, rank, scale=1.0)


def union(*bases: Tensor, rank: int | None = None) -> Tensor:
    """The subspace that several bases span together, (d, <= sum of their columns)."""
    return orthonormal(torch.cat([_matrix(basis) for basis in bases], dim=1), rank)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces in radians, ascending, min(r, s) of them.

    From the cosines where they are large angles and from the sines where they are small, so that both are exact
    (Björck and Golub, 1973; Knyazev and Argentati, 2002).
    """
    first, second = _checked(first, first.shape[0]), _checked(second, first.shape[0])
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    sines = torch.linalg.svdvals(second - first @ inner).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def mean_cosine(first: Tensor, second: Tensor) -> float | None:
    """Mean cosine of the principal angles between two subspaces, 0 to 1; None where one of them is empty."""
    if not first.shape[1] or not second.shape[1]:
        return None
    return float(torch.cos(principal_angles(first, second)).mean())


def _checked(basis: Tensor, dim: int) -> Tensor:
    work = _matrix(basis)
    if work.shape[0] != dim or not 1 <= work.shape[1] <= dim:
        raise InputError(f"a basis of 1 to {dim} columns of {dim} numbers is needed, not {list(work.shape)}")
    error = float((work.T @ work - torch.eye(work.shape[1], dtype=work.dtype)).abs().max())
    if error > _ORTHONORMAL * math.sqrt(dim):
        raise InputError(f"the basis is not orthonormal (off by {error:.2g}): pass it through orthonormal() first")
    return work


# ---------------------------------------------------------------- both sides


def joint_score(activation: float, weight: float) -> float | str:
    """The geometric mean of R on activations and R on weights, each a mean over layers; as text, why there is none."""
    if reason := _no_logarithm(activation, weight):
        return reason
    return math.sqrt(activation * weight)


def activation_weight_gap(activation: float, weight: float) -> float | str:
    """log2(R on activations) - log2(R on weights): above 0 for a subspace that the outputs use and the weights do not.

    As text, why there is none.
    """
    if reason := _no_logarithm(activation, weight):
        return reason
    return math.log2(activation) - math.log2(weight)


def _no_logarithm(activation: float, weight: float) -> str | None:
    for name, value in (("activations", activation), ("weights", weight)):
        if not value > 0.0:
            return f"R on {name} is {value:g}: it has no logarithm"
    return None
