"""The spectral norm with certified bounds, as cheaply as the question allows.

The ladder for an edited matrix, W' = W + E, given ||W||_2 and the limits the norm must stay in:

    R1  |  ||W'||_2 - ||W||_2  |  <=  ||E||_F                      one read of W and W'
    R2  the same with an upper bound on ||E||_2 from 4 Lanczos steps     8 reads of E
    R3  Lanczos on W': Ritz value from below, certificate from above  16 to 80 reads of W'
    R4  the Gram matrix, in float32, then in float64

R1 and R4 are theorems up to rounding; the upper bounds of R2 and R3 fail with probability 1e-6
(see `weightproof.numerics.lanczos`). A rung ends the climb once its bracket lies on one side of each limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from weightproof.errors import InputError
from weightproof.numerics.gram import NORM_ERROR, exact_singular_values
from weightproof.numerics.lanczos import FAILURE_PROBABILITY, ROUNDING, GolubKahan
from weightproof.numerics.matrices import (
    CHUNK_ELEMENTS,
    as_matrix,
    check_finite,
    full_precision,
    max_abs,
    row_chunks,
    row_major,
)

DELTA_STEPS = 4
SCREEN_STEPS = range(6, 25)
LIMIT_STEPS = (4, 8, 12, 24, 40)

# Float32 sums of squares below this may have lost entries to underflow.
TINY_SQUARES = 1e-24

# A difference of this many elements (16 MiB of float32) is not held beside its two matrices; smaller
# ones are, because products with them come from the cache.
UNFORMED_ELEMENTS = 1 << 22

# A norm beyond its limit is narrowed to this ratio of bounds: how far beyond decides what follows.
BEYOND_TOLERANCE = 1.1

# Without limits, the screen stops when its bracket is this narrow relative to the norm.
SCREEN_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class NormEstimate:
    """||W||_2 within `error`: |true - value| <= error, in the units of the weights.

    `method` names the rung and, for a Lanczos bound, its failure probability. `reads` counts how
    often the elements of the matrix were read (a difference reads both; a Gram matrix is one).
    """

    value: float
    error: float
    method: str
    reads: int


@dataclass(frozen=True, slots=True)
class NormReference:
    """A norm known before: |true - value| <= error."""

    value: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Limit:
    """The closed interval [low, high] that a norm must stay in."""

    low: float
    high: float

    def holds(self, lower: float, upper: float) -> bool:
        """Whether all of [lower, upper] lies inside."""
        return self.low <= lower and upper <= self.high

    def decides(self, lower: float, upper: float) -> bool:
        """Whether all of [lower, upper] lies inside, all above, or all below."""
        return self.holds(lower, upper) or lower > self.high or upper < self.low

    def settles(self, lower: float, upper: float) -> bool:
        """Whether [lower, upper] decides and, beyond the limit, also tells how far beyond."""
        return self.decides(lower, upper) and (self.holds(lower, upper) or upper <= BEYOND_TOLERANCE * lower)


def checked_limit(limit: tuple[float, float]) -> Limit:
    """The limit as an interval; InputError when it is empty or NaN."""
    low, high = limit
    if not low <= high:
        raise InputError(f"the limits of a norm are ({low}, {high}); give (low, high) with low <= high.")
    return Limit(float(low), float(high))


@full_precision
def estimate_norm(
    matrix: torch.Tensor | np.ndarray, *, key: object, limit: tuple[float, float] | None = None
) -> NormEstimate:
    """Spectral norm of one matrix by Lanczos, without any reference.

    Args:
        matrix: (d_out, d_in), any floating point dtype.
        key: Salt of the start vector, for example (name, step).
        limit: (low, high) in absolute units. Given, the bracket is narrowed until it lies on one
            side of each, with the exact norm as last resort; else until it is 5 % wide or 24
            steps were taken.

    Raises:
        InputError: NaN or inf in the matrix, or limits in the wrong order.
    """
    matrix = as_matrix(matrix, str(key))
    if limit is None:
        return _screen(matrix, key)
    return _climb(matrix, key, checked_limit(limit), (0.0, math.inf), 0)


def _screen(matrix: torch.Tensor, key: object) -> NormEstimate:
    process = GolubKahan(matrix, key=key, max_steps=SCREEN_STEPS[-1])
    for steps in SCREEN_STEPS:
        process.extend(steps)
        if not process.finite or process.vanished:
            return _exact(matrix, key, process.reads)
        if process.settled(SCREEN_TOLERANCE):
            break
        if process.exhausted:
            # Exactly low rank: rounding, not the steps taken, limits the certificate.
            return _exact(matrix, key, process.reads)
    lower, ritz, upper = process.bounds()
    return _lanczos_estimate(process, ritz, max(upper - ritz, ritz - lower))


def _lanczos_estimate(process: GolubKahan, value: float, error: float) -> NormEstimate:
    method = f"lanczos-{len(process.alphas)}, upper bound fails with p <= {FAILURE_PROBABILITY:g}"
    return NormEstimate(value, error, method, process.reads)


def _exact(matrix: torch.Tensor, key: object, reads: int, force_float64: bool = False) -> NormEstimate:
    """The norm from the Gram matrix."""
    values, dtype = exact_singular_values(matrix, name=str(key), force_float64=force_float64)
    value = float(values[0])
    return NormEstimate(value, NORM_ERROR[dtype] * value, f"gram-eigh-{str(dtype).removeprefix('torch.')}", reads + 1)


def _climb(matrix: torch.Tensor, key: object, limit: Limit, bracket: tuple[float, float], reads: int) -> NormEstimate:
    """R3 and R4: narrow `bracket`, which already holds the norm, until `limit` is decided."""
    process = GolubKahan(matrix, key=key, max_steps=LIMIT_STEPS[-1])
    for steps in LIMIT_STEPS:
        if 2 * steps > max(process.size, 2 * LIMIT_STEPS[0]):
            # The Gram matrix of so small a side is cheaper than more steps.
            break
        process.extend(steps)
        if not process.finite or process.vanished:
            break
        lower, _, upper = process.bounds()
        lower, upper = max(lower, bracket[0]), min(upper, bracket[1])
        if lower > upper:
            # Two bounds contradict each other: one of them failed. Only the exact norm can tell.
            break
        if limit.settles(lower, upper):
            # The bracket that decided, no wider: its middle, not the Ritz value, which is a lower bound.
            estimate = _lanczos_estimate(process, (lower + upper) / 2, (upper - lower) / 2)
            return NormEstimate(estimate.value, estimate.error, estimate.method, reads + process.reads)
        if process.exhausted:
            break
    reads += process.reads
    # Frees a float32 copy of half-precision weights before the Gram matrix is made.
    del process
    exact = _exact(matrix, key, reads)
    if not limit.decides(exact.value - exact.error, exact.value + exact.error):
        exact = _exact(matrix, key, exact.reads, force_float64=True)
    return exact


@full_precision
def track_norm(
    after: torch.Tensor | np.ndarray,
    before: torch.Tensor | np.ndarray,
    reference: NormReference,
    limit: tuple[float, float],
    *,
    key: object,
) -> NormEstimate:
    """Spectral norm of an edited matrix, to the accuracy that `limit` needs (the ladder R1 to R4).

    Args:
        after: (d_out, d_in), the matrix now.
        before: The matrix whose norm `reference` is.
        reference: ||before||_2 with its error.
        limit: (low, high) in absolute units.
        key: Salt of the start vectors, for example (name, step).

    Returns:
        An estimate whose whole bracket value +- error was used to decide each limit: `value` is
        on the right side of both (up to probability 1e-6 per Lanczos bound).

    Raises:
        InputError: NaN or inf in either matrix, different shapes, or limits in the wrong order.
    """
    bounds = checked_limit(limit)
    after, before = _pair(after, before, str(key))
    frobenius = _delta_frobenius(after, before, str(key))
    decided = around(reference, frobenius, bounds)
    if decided is not None:
        return NormEstimate(*decided, "delta-frobenius", 2)
    operator = min(frobenius, _delta_lanczos(after, before, key))
    reads = 4 + 2 * DELTA_STEPS
    decided = around(reference, operator, bounds)
    if decided is not None:
        method = f"delta-lanczos-{DELTA_STEPS}, upper bound fails with p <= {FAILURE_PROBABILITY:g}"
        return NormEstimate(*decided, method, reads)
    change = reference.error + operator
    return _climb(after, key, bounds, (reference.value - change, reference.value + change), reads)


def around(reference: NormReference, change: float, limit: Limit) -> tuple[float, float] | None:
    """(value, error) when a change of the norm by at most `change` decides the limit (Weyl)."""
    error = reference.error + change
    if limit.decides(reference.value - error, reference.value + error):
        return reference.value, error
    return None


def _pair(
    after: torch.Tensor | np.ndarray, before: torch.Tensor | np.ndarray, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as matrices in one memory order (a transposed pair stays as it is stored)."""
    after, before = as_matrix(after, name), as_matrix(before, name)
    if after.shape != before.shape:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise InputError(f"{name!r} has the shapes {shapes} before and after; compare matrices of one shape.")
    return after, before.to(after.device)


Scales = tuple[torch.Tensor | None, torch.Tensor | None]


def delta_dtype(after: torch.Tensor, before: torch.Tensor) -> torch.dtype:
    """The dtype in which a difference loses nothing that the stored values hold."""
    return torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)


def _delta_squares(after: torch.Tensor, before: torch.Tensor, scales: Scales, dtype: torch.dtype) -> float:
    """||diag(r) (after - before) diag(c)||_F^2 for two row-major matrices, in chunks of 1 MiB."""
    row_weight, col_weight = (
        None if scale is None else scale.to(device=after.device, dtype=torch.float64).square().to(dtype)
        for scale in scales
    )
    buffer: torch.Tensor | None = None
    total = 0.0
    for part in row_chunks(*after.shape):
        new, old = after[part].to(dtype), before[part].to(dtype)
        buffer = torch.empty_like(new) if buffer is None or buffer.shape != new.shape else buffer
        torch.sub(new, old, out=buffer)
        if row_weight is None and col_weight is None:
            total += float(torch.dot(buffer.view(-1), buffer.view(-1)))
            continue
        squares = buffer.mul_(buffer)
        rows = squares.sum(1) if col_weight is None else torch.mv(squares, col_weight)
        total += float(rows.sum() if row_weight is None else torch.dot(rows, row_weight[part]))
    return total


def _delta_frobenius(after: torch.Tensor, before: torch.Tensor, name: str, scales: Scales = (None, None)) -> float:
    """||diag(r) (after - before) diag(c)||_F, rounded up."""
    stored, turned = row_major(after)
    other = (before.t() if turned else before).contiguous()
    scales = (scales[1], scales[0]) if turned else scales
    total = _delta_squares(stored, other, scales, delta_dtype(after, before))
    unchanged = total == 0.0 and stored.dtype == other.dtype and torch.equal(stored, other)
    if not TINY_SQUARES < total < math.inf and not unchanged:
        # The data are not finite, or squares overflow or vanish in float32.
        check_finite(max_abs(after), name)
        check_finite(max_abs(before), name)
        total = _delta_squares(stored, other, scales, torch.float64)
    return math.sqrt(total) * (1.0 + ROUNDING)


def _delta(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor | _Difference:
    """The change, to be multiplied with vectors: whole only where it is small."""
    if after.numel() >= UNFORMED_ELEMENTS:
        stored, turned = row_major(after)
        return _Difference(stored, before.t() if turned else before, turned=turned)
    dtype = delta_dtype(after, before)
    if after.dtype == before.dtype == dtype:
        return torch.sub(after, before)
    delta = torch.empty(after.shape, dtype=dtype, device=after.device)
    for part in row_chunks(*after.shape):
        torch.sub(after[part].to(dtype), before[part].to(dtype), out=delta[part])
    return delta


class _Difference:
    """after - before, or its transpose, formed in chunks of rows in each product and never as a whole."""

    def __init__(self, after: torch.Tensor, before: torch.Tensor, *, turned: bool) -> None:
        self._after, self._before, self._turned = after, before, turned
        self._dtype = delta_dtype(after, before)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._after.shape[::-1] if self._turned else self._after.shape)

    @property
    def device(self) -> torch.device:
        return self._after.device

    def t(self) -> _Difference:
        return _Difference(self._after, self._before, turned=not self._turned)

    def mv(self, vec: torch.Tensor, /) -> torch.Tensor:
        height, width = self._after.shape
        product = torch.zeros(self.shape[0], dtype=torch.float32, device=self.device)
        for part in row_chunks(height, width, CHUNK_ELEMENTS if self.device.type == "cpu" else UNFORMED_ELEMENTS):
            chunk = torch.sub(self._after[part].to(self._dtype), self._before[part].to(self._dtype)).to(torch.float32)
            if self._turned:
                product.addmv_(chunk.t(), vec[part])
            else:
                product[part] = torch.mv(chunk, vec)
        return product


def _delta_lanczos(after: torch.Tensor, before: torch.Tensor, key: object, scales: Scales = (None, None)) -> float:
    """Upper bound on ||diag(r) (after - before) diag(c)||_2 from 4 Lanczos steps; inf on overflow."""
    delta = _delta(after, before)
    row_scale, col_scale = scales
    process = GolubKahan(delta, key=("delta", key), max_steps=DELTA_STEPS, row_scale=row_scale, col_scale=col_scale)
    process.extend(DELTA_STEPS)
    if not process.finite or process.vanished:
        return math.inf
    return process.bounds()[2]


@full_precision
def delta_norm_bound(
    after: torch.Tensor | np.ndarray,
    before: torch.Tensor | np.ndarray,
    *,
    key: object,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
) -> float:
    """Upper bound on ||diag(row_scale) (after - before) diag(col_scale)||_2.

    The smaller of the Frobenius norm and the bound of 4 Lanczos steps, which fails with
    probability <= 1e-6. The scales are applied to vectors; no scaled matrix is formed.

    Args:
        after: (d_out, d_in).
        before: (d_out, d_in).
        key: Salt of the start vector, for example (name, step).
        row_scale: (d_out,), or None for ones.
        col_scale: (d_in,), or None for ones.

    Raises:
        InputError: NaN or inf in either matrix, or different shapes.
    """
    after, before = _pair(after, before, str(key))
    frobenius = _delta_frobenius(after, before, str(key), (row_scale, col_scale))
    if frobenius == 0.0:
        return 0.0
    return min(frobenius, _delta_lanczos(after, before, key, (row_scale, col_scale)))
