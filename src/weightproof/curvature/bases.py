"""Decomposed factors, kept while there is room: by the digest of each sum, so that matrices share what they can.

Gate and up read the same input, so one decomposition of A serves both; energies, formulas and the correction of
eigenvalues share all of them.
"""

from __future__ import annotations

import torch

from weightproof.curvature.eigenbasis import Eigenbasis, EigenbasisCache, eigenbasis
from weightproof.curvature.factors import Factor
from weightproof.curvature.projection import FactorBases
from weightproof.snapshots.tensor_store import tensor_digest

__all__ = ["bases_of"]

_KEPT = EigenbasisCache()


def bases_of(factor: Factor) -> FactorBases:
    """The eigenbases of both factors of a matrix, with its corrected eigenvalues.

    Raises:
        InputError: If a factor is not finite, not symmetric or clearly not positive semidefinite.
    """
    gradient = _basis(factor.gradient_sum, factor.tokens, f"G of {factor.name}")
    activation = _basis(factor.activation_sum, factor.tokens, f"A of {factor.name}")
    return FactorBases(gradient, activation, factor.corrected_sum)


def _basis(total: torch.Tensor, tokens: int, what: str) -> Eigenbasis:
    return _KEPT.get(f"{tokens} {tensor_digest(total)}", lambda: eigenbasis(total / max(1, tokens), what))
