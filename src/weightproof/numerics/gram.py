"""Exact singular values through the Gram matrix of the shorter side.

The eigenvalues of the k x k Gram matrix (k = min side) are the squared singular values. Forming
it doubles the exponent range: in float32 the absolute error of s_i^2 is about 1e-7 s_1^2, so that
s_1 is good to 1e-6 but values below about 1e-3 s_1 are lost. float32 is therefore used only where
every value is at least `FLOAT32_FLOOR` s_1 (checked on the result, relative error then below
1e-3 and typically 1e-5); square matrices, small ones and float64 input go to float64 at once,
which resolves down to about 1e-8 s_1.
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import get_blas_funcs

from weightproof.numerics.matrices import SAFE_MAGNITUDE, check_finite, max_abs, row_chunks, row_major

FLOAT32_FLOOR = 1e-2

# Up to this side float64 costs next to nothing; above this aspect ratio the lower
# Marchenko-Pastur edge (1 - sqrt b) / (1 + sqrt b) comes near FLOAT32_FLOOR.
SMALL_SIDE = 256
SQUARE_ASPECT = 0.8

# Relative error of the largest singular value, by the dtype of the Gram matrix.
NORM_ERROR = {torch.float32: 1e-5, torch.float64: 1e-11}

# Elements converted or scaled at a time (8 MiB of float64).
GRAM_CHUNK_ELEMENTS = 1 << 20

# Below this fraction of s_1 a float64 Gram value is rounding noise.
NUMERICAL_ZERO = 1e-6


def needs_float64(side: int, length: int, dtype: torch.dtype) -> bool:
    """Whether float32 is not tried on a matrix of these two sides (shorter first), stored in `dtype`."""
    return dtype == torch.float64 or side <= SMALL_SIDE or side > SQUARE_ASPECT * length


def gram(
    matrix: torch.Tensor,
    dtype: torch.dtype,
    *,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Lower triangle of the k x k Gram matrix of factor * diag(row_scale) matrix diag(col_scale).

    Only the lower triangle is meaningful. On a CPU the rank-k update is BLAS syrk through scipy:
    half the work of a product, and on some processors twice the speed of torch's BLAS. What needs
    a conversion or scaling is read in chunks of the long side, so that no scaled copy is held.
    """
    stored, turned = row_major(matrix)
    if turned:
        row_scale, col_scale = col_scale, row_scale
    long_dim = 0 if stored.shape[0] >= stored.shape[1] else 1
    length, side = stored.shape[long_dim], stored.shape[1 - long_dim]
    plain = row_scale is None and col_scale is None and factor == 1.0 and stored.dtype == dtype
    result = torch.zeros(side, side, dtype=dtype, device=stored.device)
    for part in row_chunks(length, side, length * side if plain else GRAM_CHUNK_ELEMENTS):
        chunk = stored.narrow(long_dim, part.start, part.stop - part.start)
        if not plain:
            rows, cols = (
                scale if scale is None or dim != long_dim else scale[part]
                for dim, scale in enumerate((row_scale, col_scale))
            )
            chunk = _scaled(chunk, dtype, rows, cols, factor)
        result = _add_gram(result, chunk, long_dim)
    return result


def _scaled(
    chunk: torch.Tensor, dtype: torch.dtype, rows: torch.Tensor | None, cols: torch.Tensor | None, factor: float
) -> torch.Tensor:
    """A contiguous copy in `dtype`: rows and columns multiplied by their scales and `factor`."""
    scaled = chunk.to(dtype, copy=True)
    if factor != 1.0:
        scaled.mul_(factor)
    if rows is not None:
        scaled.mul_(rows.to(scaled)[:, None])
    if cols is not None:
        scaled.mul_(cols.to(scaled))
    return scaled.contiguous()


def _add_gram(total: torch.Tensor, chunk: torch.Tensor, long_dim: int) -> torch.Tensor:
    """`total` plus the Gram matrix of a contiguous chunk, summed over `long_dim`."""
    if chunk.device.type != "cpu":
        short = chunk if long_dim == 1 else chunk.t()
        return total.addmm_(short, short.t())
    syrk = get_blas_funcs(("syrk",), dtype=chunk.numpy().dtype)[0]
    # The transpose of a C-ordered chunk is Fortran-ordered: syrk reads and writes in place, and
    # its upper triangle is the lower one of the C-ordered total.
    summed = syrk(1.0, chunk.numpy().T, beta=1.0, c=total.numpy().T, trans=long_dim, lower=0, overwrite_c=1)
    return torch.from_numpy(summed.T)


def _eigenvalues(product: torch.Tensor) -> torch.Tensor:
    """Ascending eigenvalues of a symmetric matrix.

    One LAPACK thread on the CPU: a second one gains little on a tridiagonal reduction, and where
    another job holds a core the threads wait for each other (measured up to five times slower).
    """
    threads = torch.get_num_threads()
    if product.device.type != "cpu" or threads == 1:
        return torch.linalg.eigvalsh(product)
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigvalsh(product)
    finally:
        torch.set_num_threads(threads)


def exact_singular_values(
    matrix: torch.Tensor,
    *,
    name: str = "",
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    force_float64: bool = False,
) -> tuple[torch.Tensor, torch.dtype]:
    """All min(d_out, d_in) singular values, float64 on the CPU, descending; and the Gram's dtype.

    With scales: those of diag(row_scale) matrix diag(col_scale). `force_float64` skips float32.

    Raises:
        InputError: the matrix holds NaN or inf.
    """
    magnitude = max_abs(matrix)
    check_finite(magnitude, name)
    side, length = sorted(matrix.shape)
    if magnitude == 0.0:
        return torch.zeros(side, dtype=torch.float64), torch.float64
    safe = SAFE_MAGNITUDE[0] < magnitude < SAFE_MAGNITUDE[1] or row_scale is not None
    # A power of two, so that the rescaling is exact.
    factor = 1.0 if safe else math.ldexp(1.0, -math.frexp(magnitude)[1])

    def values_in(dtype: torch.dtype) -> torch.Tensor:
        product = gram(matrix, dtype, row_scale=row_scale, col_scale=col_scale, factor=factor)
        squares = _eigenvalues(product).flip(0).cpu().double().clamp(min=0.0)
        return squares.sqrt() / factor

    if not (force_float64 or needs_float64(side, length, matrix.dtype)):
        values = values_in(torch.float32)
        if values[-1] >= FLOAT32_FLOOR * values[0]:
            return values, torch.float32
    return values_in(torch.float64), torch.float64
