"""Truncated singular value decomposition: each matrix becomes its best approximation of lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.numerics.low_rank import LowRank, directions
from weightproof.types import WeightMatrix


@dataclass(frozen=True)
class SVD(Selection):
    """Keep the leading singular components of each matrix, computed in float64 and rounded once.

    The matrix keeps its shape and its dtype (nothing is factored), so that it can be judged before two thin
    matrices replace it. A matrix that has no more than the rank is left alone.

    Attributes:
        rank: Components kept, from 1.
        energy: Share of ||W||_F^2 kept, by the smallest rank of each matrix that reaches it. One of the two.
        include: See `weightproof.edits.selection.Selection`.
        exclude: Globs that win over `include`.

    Raises:
        InputError: If both or neither are given, or one is out of range.

    Example:
        >>> SVD(rank=16).name, SVD(energy=.9).name
        ('svd-rank16', 'svd-energy0.9')
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        LowRank(self.rank, self.energy)

    @property
    def name(self) -> str:
        """`svd-rank<r>` or `svd-energy<share>`."""
        return f"svd-rank{self.rank}" if self.rank is not None else f"svd-energy{self.energy:g}"

    @property
    def kind(self) -> LowRank:
        """The contract: no rank beyond the promised one, and no more error than it takes."""
        return LowRank(self.rank, self.energy)

    def params(self) -> dict[str, Any]:
        """All parameters, ready for JSON."""
        return {"rank": self.rank, "energy": self.energy, **self.selection_params()}

    def concerns(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` has more than the rank."""
        return self.rank is None or self.rank < min(matrix.d_out, matrix.d_in)

    def plan(self, matrix: WeightMatrix, context: object = None) -> torch.Tensor | None:
        """The truncated matrix (d_out, d_in) in its storage dtype; None when it stays as it is. Pure.

        Raises:
            InputError: If the matrix holds NaN or inf.
        """
        if not self.selects(matrix):
            return None
        weight = matrix.load()
        if not weight.numel():
            return None
        try:
            found = directions(weight)
        except InputError as error:
            raise InputError(f"{matrix.name} cannot be truncated: {error}") from error
        rank = self.kind.rank_of(found)
        return None if rank >= min(weight.shape) else found.projected(weight, rank).to(weight.dtype)
