"""Intruder dimensions: leading left singular vectors of a changed matrix that were none of the matrix before.

For each of the leading left singular vectors u' of W' the largest cosine with a left singular vector u_i of W is read
(Shuttleworth et al., arXiv 2410.21228): near 1 for a direction that was there, near 0 for one that came with the
change. The vectors of nearly equal singular values are not determined one by one, so those within 1 % of each other
count as one direction, with the cosine of their span.

Small matrices are decomposed whole. Of large ones the leading vectors of W' come from a block Krylov space, and the
squared cosines of u' with all u_i at once from Lanczos on W W' begun at u': they are the masses of its spectral
measure, which the first components of the eigenvectors of the tridiagonal matrix give (Golub and Meurant, 2010). No
vector of W is ever computed. Masses that so many steps cannot tell apart stay together, so such a cosine is rather too
large than too small: an intruder is not seen where there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightproof.errors import InputError
from weightproof.numerics.matrices import full_precision, seeded_generator

EXACT_SIDE = 1024
"""Up to this shorter side a matrix is decomposed whole."""
_TIE = 0.01
_NOTHING = 1e-6
_KRYLOV_BLOCKS = 6
_STEPS = 48
_RESIDUAL = 0.02
_FLOAT64_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Cosines:
    """How far the leading directions of a changed matrix were there before.

    Attributes:
        values: For each leading left singular vector after the change, strongest first, the largest cosine with those
            before.
        method: How they were found.
    """

    values: tuple[float, ...]
    method: str


@full_precision
@torch.no_grad()
def largest_cosines(before: Tensor, after: Tensor, top: int, *, exact_side: int = EXACT_SIDE) -> Cosines:
    """The largest cosine of each of the leading left singular vectors of `after` with those of `before`.

    Args:
        before: W, (d_out, d_in).
        after: W', of the same shape.
        top: How many vectors of W' are looked at; fewer where it has fewer, or where those of a large matrix cannot be
            told from their neighbours.
        exact_side: Decompose matrices up to this shorter side whole.

    Raises:
        InputError: The shapes differ, or one of them holds NaN or inf or is zero.
    """
    if before.shape != after.shape or before.ndim != 2:
        raise InputError(f"it changed its shape from {list(before.shape)} to {list(after.shape)}")
    whole = min(before.shape) <= exact_side
    dtype = torch.float64 if whole or before.numel() <= _FLOAT64_ELEMENTS else torch.float32
    old, new = _scaled(before, dtype), _scaled(after, dtype)
    if whole:
        leading, method = _all_left_vectors(new)[0][:, :top], "exact"
        values = _cosines_with_all(old, leading)
    else:
        leading, method = _leading_left_vectors(new, top), f"krylov-{_KRYLOV_BLOCKS}, lanczos-{_STEPS}"
        values = _cosines_by_lanczos(old, leading)
    return Cosines(tuple(min(1.0, value) for value in values), f"{method}, {str(new.dtype).removeprefix('torch.')}")


def _scaled(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy whose largest entry is 1."""
    work = matrix.detach().to(dtype)
    peak = float(work.abs().max()) if work.numel() else 0.0
    if not math.isfinite(peak):
        raise InputError("it holds NaN or inf: it has no singular vectors")
    if peak == 0.0:
        raise InputError("it is zero: it has no singular vectors")
    return work / peak


# ---------------------------------------------------------------- whole


def _all_left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors with their singular values, strongest first, without those of zero."""
    wide = matrix.shape[0] <= matrix.shape[1]
    energy, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values = energy.flip(0).clamp(min=0).sqrt()
    kept = values > _NOTHING * values[0]
    values, vectors = values[kept], vectors.flip(1)[:, kept]
    return (vectors if wide else matrix @ (vectors / values)), values


def _cosines_with_all(matrix: Tensor, leading: Tensor) -> list[float]:
    vectors, values = _all_left_vectors(matrix)
    masses = (vectors.T @ leading).square()
    return [_largest_mass(values, masses[:, index]) for index in range(leading.shape[1])]


def _largest_mass(values: Tensor, masses: Tensor) -> float:
    """Root of the most mass on singular values (descending) that lie within 1 % of each other."""
    sums = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
    # From each value down to 1 % below it; searchsorted wants them ascending.
    ends = torch.searchsorted(-values, -(values * (1.0 - _TIE)), right=True)
    starts = torch.arange(len(values), device=values.device)
    return math.sqrt(max(0.0, float((sums[ends] - sums[starts]).max()))) if len(values) else 0.0


# ---------------------------------------------------------------- in part


def _leading_left_vectors(matrix: Tensor, top: int) -> Tensor:
    """The leading left singular vectors that a block Krylov space settles, (d_out, <= top).

    Musco and Musco, arXiv 1504.05477. A vector stays out while W W' still turns it by more than 2 %, and so does
    everything weaker: it lies among others of nearly equal strength.
    """
    height = matrix.shape[0]
    generator = seeded_generator("intruders", *matrix.shape)
    block = torch.randn(height, 2 * top, generator=generator, dtype=torch.float64).to(matrix)
    blocks: list[Tensor] = []
    for _ in range(_KRYLOV_BLOCKS):
        block = torch.linalg.qr(matrix @ (matrix.T @ block)).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    inner, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    leading, values = (basis @ inner)[:, :top], values[:top]
    turned = matrix @ (matrix.T @ leading) - leading * values.square()
    residual = torch.linalg.vector_norm(turned, dim=0) / values.square().clamp(min=torch.finfo(values.dtype).tiny)
    unsettled = (residual > _RESIDUAL).nonzero()
    return leading[:, : int(unsettled[0]) if len(unsettled) else top]


def _cosines_by_lanczos(matrix: Tensor, leading: Tensor) -> list[float]:
    """Largest cosine of each column with a left singular vector, by its spectral measure."""
    count = leading.shape[1]
    if not count:
        return []
    size = float(torch.linalg.vector_norm(matrix))
    alphas, betas = _lanczos(matrix, leading, min(_STEPS, *matrix.shape), size)
    found: list[float] = []
    for index in range(count):
        diagonal = torch.diag(alphas[:, index]) + torch.diag(betas[:, index], 1) + torch.diag(betas[:, index], -1)
        nodes, vectors = torch.linalg.eigh(diagonal)
        values, masses = nodes.clamp(min=0).sqrt().flip(0), vectors[0].square().flip(0)
        there = values > _NOTHING * size
        found.append(_largest_mass(values[there], masses[there]))
    return found


def _lanczos(matrix: Tensor, start: Tensor, steps: int, size: float) -> tuple[Tensor, Tensor]:
    """Coefficients (steps, k) and (steps - 1, k) of Lanczos on W W' from each column of `start`, in float64.

    Every vector is made orthogonal to all before it, twice. Where a column's space is exhausted its later
    coefficients are 0: such steps carry no mass.
    """
    known = [start / torch.linalg.vector_norm(start, dim=0)]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(steps):
        vector = matrix @ (matrix.T @ known[-1])
        alphas.append((known[-1] * vector).sum(0))
        if step == steps - 1:
            break
        for _ in range(2):
            for one in known:
                vector = vector - one * (one * vector).sum(0)
        length = torch.linalg.vector_norm(vector, dim=0)
        alive = length > 10 * torch.finfo(vector.dtype).eps * size**2
        betas.append(torch.where(alive, length, torch.zeros_like(length)))
        known.append(torch.where(alive, vector / torch.where(alive, length, torch.ones_like(length)), 0.0))
    stacked = [torch.stack(rows).to("cpu", torch.float64) for rows in (alphas, betas) if rows]
    return stacked[0], stacked[1] if len(stacked) > 1 else stacked[0][:0]


# ---------------------------------------------------------------- stored directions


def written_cosine(change: Tensor, basis: Tensor) -> float:
    """||Q'E||_F / ||E||_F: how far a change of a matrix (d_out, d_in) writes into directions Q, (d_out, k) orthonormal.

    The root mean square of the cosines of its columns with Q, each column weighted by its square. A random change of
    any rank has sqrt(k / d_out) in root mean square.
    """
    size = float(torch.linalg.vector_norm(change))
    return float(torch.linalg.vector_norm(basis.to(change).T @ change)) / size if size else 0.0


def matrix_cosine(change: Tensor, stored: Tensor) -> float:
    """<E, D> / (||E||_F ||D||_F), -1 to 1; 0 where one of them is zero."""
    other = stored.to(change)
    sizes = float(torch.linalg.vector_norm(change)) * float(torch.linalg.vector_norm(other))
    return float((change * other).sum()) / sizes if sizes else 0.0
