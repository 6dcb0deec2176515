"""Golub-Kahan-Lanczos bidiagonalisation with a certified upper bound on the spectral norm.

After k steps from a start vector v_1, A V_k = U_k B_k with B_k upper bidiagonal. The largest
singular value of B_k (the Ritz value) never exceeds s_1 = ||A||_2. An upper bound comes from the
Lanczos polynomial p_k of A'A: v_{k+1} = p_k(A'A) v_1 has norm 1, so p_k(s_1^2) |<v_1, y_1>| <= 1
for the top right singular vector y_1, and p_k increases beyond the largest Ritz value. For v_1
uniform on the sphere of R^n, |<v_1, y_1>| < eps sqrt(pi / (2 n)) has probability <= eps.
(Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput. 2013.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from weightproof.numerics.matrices import seeded_generator

# Failure probability of the upper bound, per matrix and check.
FAILURE_PROBABILITY = 1e-6

# Relative allowance for float32 products: bounds are widened by it on either side.
ROUNDING = 1e-5

# Left vectors are orthogonalised when rounding, followed through their recurrence, may have grown
# to this many units of float32: B'B = V'A'AV holds only for orthonormal left vectors.
DRIFT_LIMIT = 30.0

# Below this fraction of the largest coefficient the Krylov space is exhausted (exact low rank).
BREAKDOWN = 1e-5

# Smaller first coefficients would underflow when squared.
TINY = 1e-15

# A bound is refined to this fraction of its distance from the Ritz value.
BOUND_RESOLUTION = 1e-2


class Bidiagonal:
    """The coefficients of k steps, B_k, and what they prove about ||A||_2.

    Args:
        size: Dimension of the space that the start vector was drawn from.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.exhausted = False

    @classmethod
    def from_steps(cls, alphas: Sequence[float], betas: Sequence[float], *, size: int) -> Bidiagonal:
        """The steps up to the one at which the Krylov space was exhausted or float32 overflowed."""
        kept = cls(size)
        for alpha, beta in zip(alphas, betas, strict=True):
            largest = kept.largest(alpha)
            if is_lost(alpha, largest):
                kept._append(alpha, 0.0)
                break
            kept._append(alpha, beta)
            if is_lost(beta, largest):
                kept.exhausted = True
                break
        return kept

    def largest(self, alpha: float) -> float:
        """The largest coefficient up to now, the new `alpha` included."""
        return max(*self.alphas, *self.betas, alpha, alpha)

    def _append(self, alpha: float, beta: float) -> None:
        self.alphas.append(alpha)
        self.betas.append(beta)
        self.exhausted = beta == 0.0

    @property
    def finite(self) -> bool:
        """False when a NaN, an inf or a float32 overflow came up."""
        return math.isfinite(sum(self.alphas) + sum(self.betas))

    @property
    def vanished(self) -> bool:
        """True when the matrix looks like zero in float32: zero, or too small to be squared."""
        return not self.alphas or self.alphas[0] < TINY

    def ritz_value(self) -> float:
        """The largest singular value of B_k: a lower bound on ||A||_2 up to `ROUNDING`."""
        diagonal, off_diagonal = _tridiagonal(self.alphas, self.betas)
        matrix = np.diag(diagonal) + np.diag(off_diagonal[:-1], 1) + np.diag(off_diagonal[:-1], -1)
        return math.sqrt(max(float(np.linalg.eigvalsh(matrix)[-1]), 0.0))

    def bounds(self, eps: float = FAILURE_PROBABILITY) -> tuple[float, float, float]:
        """(lower, Ritz value, upper) for ||A||_2; the upper bound fails with probability <= eps."""
        ritz = self.ritz_value()
        if ritz == 0.0:
            return 0.0, 0.0, 0.0
        certificate = Certificate(self.alphas, self.betas, ritz, size=self.size, eps=eps)
        return ritz * (1.0 - ROUNDING), ritz, certificate.upper_bound() * (1.0 + ROUNDING)

    def settled(self, tolerance: float) -> bool:
        """Whether the upper bound lies within a factor 1 + tolerance of the Ritz value."""
        ritz = self.ritz_value()
        certificate = Certificate(self.alphas, self.betas, ritz, size=self.size, eps=FAILURE_PROBABILITY)
        return certificate.excludes((1.0 + tolerance) ** 2)


def is_lost(value: float, largest: float) -> bool:
    """Whether a coefficient beside the largest one is rounding noise, NaN or inf: no step can follow it."""
    return not value > BREAKDOWN * largest or math.isinf(value)


class Operand(Protocol):
    """What Lanczos needs of a matrix that is not held as a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        ...

    def mv(self, vec: torch.Tensor, /) -> torch.Tensor:
        """The product with a float32 vector, in float32."""
        ...

    def t(self) -> Operand:
        """The transpose."""
        ...


class GolubKahan(Bidiagonal):
    """A growing bidiagonalisation of diag(row_scale) matrix diag(col_scale), never formed.

    Args:
        matrix: (d_out, d_in) floating point tensor; half precision and float64 are read as float32.
            Or anything that can be multiplied like one.
        key: Salt of the start vector, for example (name, step).
        max_steps: The most steps that will be taken.
        row_scale: (d_out,) or None.
        col_scale: (d_in,) or None.

    The right vectors, on the shorter side, are re-orthogonalised at every step, the left ones only
    when their drift calls for it: mostly the former suffices (Simon and Zha 2000).
    """

    def __init__(
        self,
        matrix: torch.Tensor | Operand,
        *,
        key: object,
        max_steps: int,
        row_scale: torch.Tensor | None = None,
        col_scale: torch.Tensor | None = None,
    ) -> None:
        tall = matrix.shape[0] >= matrix.shape[1]
        operand: Operand = matrix.to(torch.float32) if isinstance(matrix, torch.Tensor) else matrix
        self._matrix, self._matrix_t = (operand, operand.t()) if tall else (operand.t(), operand)
        scales = (row_scale, col_scale) if tall else (col_scale, row_scale)
        self._long_scale, self._short_scale = (
            None if scale is None else scale.to(device=matrix.device, dtype=torch.float32) for scale in scales
        )
        super().__init__(self._matrix.shape[1])
        start = torch.randn(self.size, generator=seeded_generator("golub-kahan", key), device="cpu")
        self._right = torch.empty(max_steps + 1, self.size, dtype=torch.float32, device=matrix.device)
        self._right[0] = start / torch.linalg.vector_norm(start)
        self._left = torch.empty(max_steps, self._matrix.shape[0], dtype=torch.float32, device=matrix.device)
        self._drift = 0.0

    @property
    def reads(self) -> int:
        """How often the matrix has been read."""
        return 2 * len(self.alphas)

    def extend(self, steps: int) -> None:
        """Take steps until `steps` have been taken in all or the Krylov space is exhausted."""
        while len(self.alphas) < steps and not self.exhausted:
            self._step()

    def _step(self) -> None:
        taken = len(self.alphas)
        left = self._forward(self._right[taken])
        beta = self.betas[-1] if taken else 0.0
        if taken:
            left.sub_(self._left[taken - 1], alpha=beta)
        alpha = float(torch.linalg.vector_norm(left))
        self._drift = (beta * self._drift + self.largest(alpha)) / max(alpha, TINY)
        if taken and self._drift > DRIFT_LIMIT:
            alpha = _orthogonalise(left, self._left[:taken])
            self._drift = 1.0
        largest = self.largest(alpha)
        if is_lost(alpha, largest):
            self._append(alpha, 0.0)
            return
        torch.mul(left, 1.0 / alpha, out=self._left[taken])
        right = self._backward(self._left[taken])
        # The known component goes first: what the basis then removes is of the size of rounding, so
        # that a departure of the basis from orthogonality is not amplified from step to step.
        right.sub_(self._right[taken], alpha=alpha)
        beta = _orthogonalise(right, self._right[: taken + 1])
        self._append(alpha, beta)
        if is_lost(beta, largest):
            self.exhausted = True
            return
        torch.mul(right, 1.0 / beta, out=self._right[taken + 1])

    def _forward(self, vector: torch.Tensor) -> torch.Tensor:
        if self._short_scale is not None:
            vector = vector * self._short_scale
        product = self._matrix.mv(vector)
        return product if self._long_scale is None else product.mul_(self._long_scale)

    def _backward(self, vector: torch.Tensor) -> torch.Tensor:
        if self._long_scale is not None:
            vector = vector * self._long_scale
        product = self._matrix_t.mv(vector)
        return product if self._short_scale is None else product.mul_(self._short_scale)


def _orthogonalise(vector: torch.Tensor, basis: torch.Tensor) -> float:
    """Remove the rows of `basis` from `vector` in place; its norm after that."""
    vector.addmv_(basis.t(), torch.mv(basis, vector), alpha=-1.0)
    return float(torch.linalg.vector_norm(vector))


def _tridiagonal(alphas: list[float], betas: list[float]) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of B'B; the last off-diagonal entry belongs to v_{k+1}."""
    shifted = [0.0, *betas[:-1]]
    diagonal = [alpha * alpha + beta * beta for alpha, beta in zip(alphas, shifted, strict=True)]
    return diagonal, [alpha * beta for alpha, beta in zip(alphas, betas, strict=True)]


class Certificate:
    """The upper bound that k steps certify, from their Lanczos polynomial.

    Points t are relative to the squared Ritz value. Coefficients lost in rounding (breakdown) are
    replaced by the rounding level: that only shrinks p_k, so that the bound stays valid.
    """

    def __init__(self, alphas: list[float], betas: list[float], ritz: float, *, size: int, eps: float) -> None:
        unit = ritz * ritz
        diagonal, off_diagonal = _tridiagonal(alphas, betas)
        couplings = [max(value / unit, BREAKDOWN) for value in off_diagonal]
        self._ritz = ritz
        self._rows = list(zip([value / unit for value in diagonal], [0.0, *couplings], couplings, strict=False))
        self._target = 1.0 / (eps * math.sqrt(math.pi / (2.0 * size)))

    def excludes(self, point: float) -> bool:
        """Whether p_k(point) >= 1 / (eps sqrt(pi / (2 n))): the squared norm is then below it."""
        previous, current = 0.0, 1.0
        for middle, before, off in self._rows:
            previous, current = current, ((point - middle) * current - before * previous) / off
        return not current < self._target

    def upper_bound(self) -> float:
        """The smallest excluded norm, to `BOUND_RESOLUTION` of its distance from the Ritz value."""
        high = 1e-6
        while not self.excludes(1.0 + high):
            high *= 8.0
        low = 0.0 if high <= 1e-6 else high / 8.0
        while high - low > BOUND_RESOLUTION * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if self.excludes(1.0 + middle) else (middle, high)
        return self._ritz * math.sqrt(1.0 + high)
