"""Eigendecompositions of Kronecker factors: descending, never negative, in float64 where that is affordable.

A factor of a language model is an n x n covariance, n up to some ten thousand. `eigh` costs about 10 n^3 operations
and three to four times the memory of its input; float64 takes about twice the time of float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from weightproof.errors import InputError

__all__ = ["Eigenbasis", "EigenbasisCache", "checked_factor", "eigenbasis"]

# Above this size float64 takes minutes on one thread of a CPU, and float32 is used there.
FLOAT64_SIZE = 8192

# Relative to the largest magnitude: what accumulation in float32 over many batches leaves of asymmetry.
_ASYMMETRY = 1e-4

# Relative to the largest eigenvalue: covariances have no negative ones but by rounding.
_NEGATIVE = 1e-3


@dataclass(frozen=True)
class Eigenbasis:
    """factor = vectors diag(values) vectors'.

    Attributes:
        values: (n,) descending, not negative, float64.
        vectors: (n, n), columns in the order of `values`.
        trace: Sum of the diagonal of the factor.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    trace: float

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + self.vectors.nbytes


def checked_factor(factor: torch.Tensor, size: int, what: str) -> torch.Tensor:
    """A factor that is fit to be decomposed.

    Args:
        factor: (n, n).
        size: What n must be.
        what: Which factor, for the error.

    Raises:
        InputError: If it has another shape, holds NaN or inf, is not symmetric, or has a negative diagonal.
    """
    if factor.shape != (size, size):
        raise InputError(f"{what} has shape {list(factor.shape)}, the weights need [{size}, {size}]")
    if not factor.is_floating_point():
        raise InputError(f"{what} holds {factor.dtype}, not floating point numbers")
    if not bool(torch.isfinite(factor).all()):
        raise InputError(f"{what} holds NaN or inf: fit it again")
    largest = float(factor.abs().max())
    if float((factor - factor.T).abs().max()) > _ASYMMETRY * largest:
        raise InputError(f"{what} is not symmetric, so it is no covariance: fit it again")
    if float(factor.diagonal().min()) < -_NEGATIVE * largest:
        raise InputError(f"{what} has negative numbers on its diagonal, so it is no covariance: fit it again")
    return factor


def eigenbasis(factor: torch.Tensor, what: str = "the factor") -> Eigenbasis:
    """Decompose a covariance.

    Args:
        factor: (n, n), symmetric, positive semidefinite up to rounding.
        what: Which factor, for errors.

    Raises:
        InputError: As `checked_factor`, or if it has clearly negative eigenvalues.
    """
    checked_factor(factor, factor.shape[0], what)
    dtype = torch.float64 if factor.shape[0] <= FLOAT64_SIZE else torch.float32
    work = factor.detach().to(dtype)
    values, vectors = torch.linalg.eigh((work + work.T) / 2)
    values = _settled(values, what)
    return Eigenbasis(values, vectors.flip(1), float(work.diagonal().sum(dtype=torch.float64)))


def _settled(values: torch.Tensor, what: str) -> torch.Tensor:
    values = values.to(torch.float64).flip(0)
    if float(values[-1]) < -_NEGATIVE * max(float(values[0]), 0.0) - 1e-300:
        raise InputError(
            f"{what} has an eigenvalue of {float(values[-1]):.3g} beside a largest one of {float(values[0]):.3g}: "
            "a covariance has none below zero; fit it again"
        )
    return values.clamp(min=0.0)


@dataclass
class EigenbasisCache:
    """Decompositions by the digest of their factor, the least recently used dropped beyond `max_bytes`."""

    max_bytes: int = 2 << 30
    _kept: OrderedDict[str, Eigenbasis] = field(default_factory=OrderedDict)

    def get(self, digest: str, make: Callable[[], Eigenbasis]) -> Eigenbasis:
        """The decomposition of the factor with this digest, made by `make` where it is not kept."""
        found = self._kept.pop(digest, None)
        if found is None:
            found = make()
        self._kept[digest] = found
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)
        return found
