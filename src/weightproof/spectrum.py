"""Spectra of weight matrices: exact singular values, certified norms and a cheap profile.

Pure functions of arrays. `measure_spectrum` gives everything about one matrix; `estimate_norm`
and `track_norm` (see `weightproof.numerics.norms`) give the spectral norm alone, orders of magnitude
cheaper; `profile` reads the elements about once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from weightproof.numerics.gram import NORM_ERROR, exact_singular_values
from weightproof.numerics.matrices import (
    as_matrix,
    full_precision,
    max_abs,
    row_chunks,
    row_major,
    seeded_generator,
    working_dtype,
)
from weightproof.numerics.norms import NormEstimate, NormReference, delta_norm_bound, estimate_norm, track_norm
from weightproof.types import Spectrum

__all__ = [
    "NormEstimate",
    "NormReference",
    "PowerLaw",
    "Profile",
    "delta_norm_bound",
    "effective_rank",
    "estimate_norm",
    "measure_spectrum",
    "power_law_alpha",
    "profile",
    "seeded_generator",
    "track_norm",
]

XMIN_CANDIDATES = 100
SHORTEST_TAIL = 8

# Squares below this may have vanished in float32: such rows are looked at again in float64.
FAINT = 1e-30


@full_precision
def measure_spectrum(matrix: torch.Tensor | np.ndarray, exact: bool = True, *, name: str = "") -> Spectrum:
    """Singular values of a matrix and the statistics made of them.

    Args:
        matrix: (d_out, d_in), any floating point dtype; never modified.
        exact: All singular values from the Gram matrix, in float32 where every value is then
            accurate, in float64 otherwise (`weightproof.numerics.gram` gives the rule; `method` says
            which). False: a Lanczos screen of at most 24 steps with a certified error, the
            Frobenius norm, and no statistic that needs the whole spectrum.
        name: Used in errors, as salt of the start vector, and in the result.

    Raises:
        InputError: not a 2-D floating point matrix, or NaN or inf in it.

    Example:
        >>> round(measure_spectrum(torch.eye(3)).stable_rank, 6)
        3.0
    """
    matrix = as_matrix(matrix, name)
    d_out, d_in = matrix.shape
    if not exact:
        return _screen_spectrum(matrix, name)
    values, dtype = exact_singular_values(matrix, name=name)
    norm = float(values[0])
    frobenius = float(torch.linalg.vector_norm(values))
    fit = power_law_alpha(values)
    return Spectrum(
        name=name,
        d_out=d_out,
        d_in=d_in,
        spectral_norm=norm,
        spectral_norm_error=NORM_ERROR[dtype] * norm,
        frobenius_norm=frobenius,
        stable_rank=(frobenius / norm) ** 2 if norm else 0.0,
        effective_rank=effective_rank(values),
        alpha=None if fit is None else fit.alpha,
        alpha_error=None if fit is None else fit.error,
        singular_values=values,
        method=f"gram-eigh-{str(dtype).removeprefix('torch.')}",
    )


def _screen_spectrum(matrix: torch.Tensor, name: str) -> Spectrum:
    estimate = estimate_norm(matrix, key=name)
    frobenius = profile(matrix).frobenius_norm
    assert frobenius is not None  # estimate_norm has refused what is not finite
    return Spectrum(
        name=name,
        d_out=matrix.shape[0],
        d_in=matrix.shape[1],
        spectral_norm=estimate.value,
        spectral_norm_error=estimate.error,
        frobenius_norm=frobenius,
        stable_rank=(frobenius / estimate.value) ** 2 if estimate.value else 0.0,
        effective_rank=None,
        alpha=None,
        alpha_error=None,
        singular_values=None,
        method=estimate.method,
    )


def effective_rank(singular_values: torch.Tensor | np.ndarray) -> float:
    """Exponential of the entropy of p_i = s_i^2 / sum s^2 (after Roy and Vetterli 2007); 0 for all zeros."""
    values = torch.as_tensor(singular_values, dtype=torch.float64)
    top = float(values.max())
    if top == 0.0:
        return 0.0
    energy = (values / top).square()
    share = energy / energy.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Power-law tail of the eigenvalue density, rho(x) ~ x^-alpha for x = s^2 >= xmin.

    `error` is the standard error (alpha - 1) / sqrt(k) of the k values in the tail, `ks` the
    Kolmogorov-Smirnov distance of the tail to the law. The fit is meaningful only where there
    are outliers: for a pure noise matrix it returns a large number that says nothing.
    """

    alpha: float
    error: float
    xmin: float
    ks: float
    tail: int


def power_law_alpha(singular_values: torch.Tensor | np.ndarray) -> PowerLaw | None:
    """Maximum likelihood exponent of the tail of x = s^2, with xmin at the smallest KS distance.

    alpha(xmin) = 1 + k / sum ln(x_i / xmin) over the k values >= xmin (Clauset, Shalizi and
    Newman 2009), over 100 candidates for xmin: within .02 of the scan of all.

    Args:
        singular_values: 1-D, any order.

    Returns:
        None when fewer than 8 singular values are positive, or all are equal.
    """
    values = torch.as_tensor(singular_values, dtype=torch.float64).cpu().numpy()
    top = float(values.max(initial=0.0))
    # Zeros of a low-rank matrix come out as rounding noise of relative size 1e-8.
    values = np.sort(values[values > 1e-7 * top])
    if len(values) < SHORTEST_TAIL or values[0] == values[-1]:
        return None
    logs = 2.0 * np.log(values)
    starts = np.unique(np.linspace(0, len(logs) - SHORTEST_TAIL, XMIN_CANDIDATES).astype(int))
    counts = len(logs) - starts
    sums = np.cumsum(logs[::-1])[::-1][starts] - counts * logs[starts]
    usable = sums > 0.0
    starts, counts, sums = starts[usable], counts[usable], sums[usable]
    exponents = counts / sums
    position = np.arange(len(logs))[None, :] - starts[:, None]
    law = -np.expm1(-exponents[:, None] * (logs[None, :] - logs[starts][:, None]).clip(min=0.0))
    empirical = position / counts[:, None]
    distance = np.maximum(np.abs(law - empirical), np.abs(law - empirical - 1.0 / counts[:, None]))
    distance[position < 0] = 0.0
    worst = distance.max(axis=1)
    best = int(worst.argmin())
    tail = int(counts[best])
    return PowerLaw(
        alpha=1.0 + float(exponents[best]),
        error=float(exponents[best]) / math.sqrt(tail),
        xmin=math.exp(logs[starts[best]]),
        ks=float(worst[best]),
        tail=tail,
    )


@dataclass(frozen=True, slots=True)
class Profile:
    """What one or two reads of the elements tell.

    `norm_collapse` is min(row_min / row_median, col_min / col_median) over row and column norms,
    0 for a matrix with a zero median norm. `frobenius_norm`, `max_abs` and `norm_collapse` are
    None when `num_nonfinite` (the exact number of NaN and inf) is not 0.
    """

    frobenius_norm: float | None
    max_abs: float | None
    num_nonfinite: int
    norm_collapse: float | None
    zero_rows: int
    zero_cols: int


@dataclass(frozen=True, slots=True, eq=False)
class Energies:
    """Sums of squares by row and by column (float64), and what else one read tells of a matrix or a part of one.

    With NaN or inf in the elements, `max_abs` is NaN or inf and `num_nonfinite` counts them.
    """

    rows: np.ndarray
    cols: np.ndarray
    max_abs: float
    num_nonfinite: int

    def profile(self) -> Profile:
        """The profile of a whole matrix with these energies."""
        zero_rows, zero_cols = int((self.rows == 0).sum()), int((self.cols == 0).sum())
        if not math.isfinite(self.max_abs):
            return Profile(None, None, self.num_nonfinite, None, zero_rows, zero_cols)
        return Profile(
            frobenius_norm=math.sqrt(float(self.rows.sum())),
            max_abs=self.max_abs,
            num_nonfinite=0,
            norm_collapse=min(_collapse(self.rows), _collapse(self.cols)),
            zero_rows=zero_rows,
            zero_cols=zero_cols,
        )


@full_precision
def profile(matrix: torch.Tensor | np.ndarray) -> Profile:
    """Norms, finiteness and dead rows or columns of a matrix, in one chunked pass.

    Args:
        matrix: (d_out, d_in), any floating point dtype; NaN and inf are counted, not refused.

    Raises:
        InputError: not a 2-D floating point matrix.
    """
    return read_energies(as_matrix(matrix)).profile()


def read_energies(matrix: torch.Tensor) -> Energies:
    """Energies of a matrix that is not empty, in float64 where float32 squares would vanish or overflow."""
    stored, turned = row_major(matrix)
    rows, cols, largest = _energies(stored, working_dtype(stored))
    faint = min(float(rows.min()), float(cols.min())) <= FAINT or not math.isfinite(largest)
    if faint and stored.dtype != torch.float64:
        rows, cols, largest = _energies(stored, torch.float64)
    if turned:
        rows, cols = cols, rows
    if not math.isfinite(largest):
        return Energies(rows, cols, largest, _count_nonfinite(stored))
    return Energies(rows, cols, max_abs(stored) if faint else math.sqrt(largest), 0)


def _energies(stored: torch.Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums of squares by row and by column (float64), and the largest square (NaN, inf propagate)."""
    height, width = stored.shape
    rows = torch.empty(height, dtype=dtype, device=stored.device)
    cols = torch.zeros(width, dtype=torch.float64, device=stored.device)
    largest = torch.zeros((), dtype=dtype, device=stored.device)
    for part in row_chunks(height, width):
        chunk = stored[part].to(dtype)
        squares = torch.mul(chunk, chunk)
        torch.sum(squares, dim=1, out=rows[part])
        cols += squares.sum(0)
        largest = torch.maximum(largest, squares.amax())
    return rows.double().cpu().numpy(), cols.cpu().numpy(), float(largest)


def _count_nonfinite(stored: torch.Tensor) -> int:
    return sum(int((~torch.isfinite(stored[part])).sum()) for part in row_chunks(*stored.shape))


def _collapse(energies: np.ndarray) -> float:
    norms = np.sqrt(energies)
    median = float(np.median(norms))
    return float(norms.min()) / median if median else 0.0
