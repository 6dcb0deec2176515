"""What every numerical module needs first: a checked 2-D tensor, its chunks, and seeded randomness."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from weightproof.errors import InputError

# 1 MiB of float32: a chunk and what is computed from it stay in the second-level cache.
CHUNK_ELEMENTS = 1 << 18

# Squares of entries in this range neither overflow nor lose the small ones in float32 sums.
SAFE_MAGNITUDE = (1e-12, 1e12)

P = ParamSpec("P")
R = TypeVar("R")


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is the SHA-256 of `parts` (purpose, name, step, ...).

    Salting by purpose and name keeps probe vectors independent of the generator that once
    initialised the weights: with a shared seed the start vector can equal a row of the matrix.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def as_matrix(matrix: torch.Tensor | np.ndarray, name: str = "") -> torch.Tensor:
    """The matrix as a detached 2-D floating point tensor (a view wherever possible).

    Raises:
        InputError: no tensor or array, not 2-D, empty, not of a floating point dtype, or without data (meta, sparse).
    """
    label = repr(name) if name else "the matrix"
    if isinstance(matrix, np.ndarray):
        if matrix.dtype not in (np.float16, np.float32, np.float64):
            raise InputError(f"{label} has dtype {matrix.dtype}; give a float16, float32 or float64 array.")
        # from_numpy takes neither read-only memory (it warns) nor negative strides (it raises).
        shareable = matrix.flags.writeable and all(stride >= 0 for stride in matrix.strides)
        matrix = torch.from_numpy(matrix if shareable else matrix.copy())
    if not isinstance(matrix, torch.Tensor):
        raise InputError(f"{label} is of type {type(matrix).__name__}; give a torch tensor or a numpy array.")
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise InputError(f"{label} has shape {tuple(matrix.shape)}; give a 2-D matrix that is not empty.")
    if not matrix.is_floating_point():
        raise InputError(f"{label} has dtype {matrix.dtype}; dequantize it to a floating point dtype first.")
    if matrix.is_meta or matrix.layout != torch.strided:
        raise InputError(f"{label} holds no dense data ({matrix.device}, {matrix.layout}); materialise it first.")
    return matrix.detach()


def row_major(matrix: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The matrix or its transpose, whichever is contiguous, and whether it was turned."""
    if matrix.is_contiguous():
        return matrix, False
    if matrix.t().is_contiguous():
        return matrix.t(), True
    return matrix.contiguous(), False


def row_chunks(rows: int, cols: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of consecutive rows, each of about `elements` elements."""
    step = max(1, elements // cols)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def working_dtype(matrix: torch.Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: half precision is never summed in half precision."""
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def check_finite(value: float, name: str) -> None:
    """Raise InputError naming the matrix when a norm of it is NaN or infinite."""
    if not math.isfinite(value):
        label = repr(name) if name else "the matrix"
        raise InputError(f"{label} holds NaN or infinite values, so it has no spectrum; profile() counts them.")


def max_abs(matrix: torch.Tensor) -> float:
    """Largest |w_ij| in one read; NaN if there is one (aminmax propagates it)."""
    low, high = (float(bound) for bound in torch.aminmax(matrix))
    return max(-low, high) if not math.isnan(low) else low


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` outside of autocast, which would compute products in half precision."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args, **kwargs)
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return function(*args, **kwargs)

    return wrapper
