"""Low rank: the best approximation of a matrix by one of lower rank, and the contract that holds an edit to it.

By Eckart and Young (1936) no matrix of rank r is nearer to W than its r leading singular components, at the
distance (sum of the squared singular values left out)^(1/2). Both ends of that are checked: what is beyond rank r
in W' is no more than the rounding of its storage, and W' lies no further from W than the best one does.
Everything is computed in float64 from the eigenvectors of the smaller Gram matrix; singular values below 1e-8 of
the largest are lost in it, hence the allowance of 1e-7 ||W||_F in both bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightproof.contracts.quantities import incomparable
from weightproof.errors import InputError
from weightproof.types import ContractReading

_GRAM_LOSS = 1e-7
# Of the share of energy: where two ranks reach it up to rounding, either is right.
_ENERGY_SLACK = 1e-9


class Directions(NamedTuple):
    """Leading directions of a matrix, on the side on which it is shorter.

    `energy` are the squared singular values, descending, over the square of `scale`; column i of
    `vectors` belongs to number i. `is_left`: they are left singular vectors.
    """

    energy: Tensor
    vectors: Tensor
    is_left: bool
    scale: float

    def projected(self, weight: Tensor, rank: int) -> Tensor:
        """The part of a matrix (d_out, d_in) in the leading directions, float64."""
        leading = self.vectors[:, :rank]
        work = weight.to(torch.float64)
        return leading @ (leading.T @ work) if self.is_left else (work @ leading) @ leading.T

    def rank_for(self, share: float) -> int:
        """The smallest rank that holds this share of ||W||_F^2; 0 for a zero matrix."""
        reached = self.energy.cumsum(0)
        if not len(reached) or float(reached[-1]) == 0.0:
            return 0
        return min(len(reached), 1 + int((reached < share * reached[-1]).sum()))


def directions(weight: Tensor) -> Directions:
    """The singular directions of a matrix (d_out, d_in).

    Raises:
        InputError: It holds NaN or inf.
    """
    work = weight.to(torch.float64)
    peak = float(work.abs().max()) if work.numel() else 0.0
    if not math.isfinite(peak):
        raise InputError("it holds NaN or inf: it has no singular values")
    scale = peak or 1.0  # squares of huge or tiny weights would leave float64
    work = work / scale
    is_left = work.shape[0] <= work.shape[1]
    energy, vectors = torch.linalg.eigh(work @ work.T if is_left else work.T @ work)
    return Directions(energy.flip(0).clamp(min=0), vectors.flip(1), is_left, scale)


@dataclass(frozen=True)
class LowRank:
    """Each matrix became its best approximation of a rank, or of the smallest rank that holds a share of its energy.

    Attributes:
        rank: Largest rank; None where `energy` is given.
        energy: Share of ||W||_F^2 that is kept, above 0 and at most 1.
    """

    rank: int | None = None
    energy: float | None = None

    name = "low_rank"

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if (self.rank is None) == (self.energy is None):
            raise InputError("give either rank= or energy=, not both and not none")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise InputError(f"rank must be a whole number from 1, not {self.rank!r}")
        if self.energy is not None and not _is_share(self.energy):
            raise InputError(f"energy must be a share above 0 and at most 1 (not percent), not {self.energy!r}")

    def params(self) -> dict[str, Any]:
        """Rank and energy."""
        return {"rank": self.rank, "energy": self.energy}

    def rank_of(self, found: Directions, slack: float = 0.0) -> int:
        """The rank that a matrix of these directions keeps."""
        if self.rank is not None:
            return min(self.rank, len(found.energy))
        return found.rank_for(min(1.0, (self.energy or 0.0) + slack))

    def measure(self, name: str, before: Tensor, after: Tensor) -> tuple[ContractReading, ...]:
        """What is left beyond the rank, over what rounding leaves there; the error, over that of the best one."""
        reason, values = incomparable(before, after), None
        if reason is None:
            values = self._values(before, after)
        return tuple(
            ContractReading(
                name, statistic, None if values is None else values[place], 1.0, rigorous=True, reason=reason
            )
            for place, statistic in enumerate(("tail_over_rounding", "error_over_tail"))
        )

    def _values(self, before: Tensor, after: Tensor) -> tuple[float, float]:
        old, new = before.to(torch.float64), after.to(device=before.device, dtype=torch.float64)
        if not bool(torch.isfinite(old).all() and torch.isfinite(new).all()):
            return math.inf, math.inf
        found = directions(old)
        size = _norm(old)
        allowed = _rounding_norm(new, after.dtype) + _GRAM_LOSS * size
        tail = _norm(new - directions(new).projected(new, self.rank_of(found, _ENERGY_SLACK)))
        best = _norm(old - found.projected(old, self.rank_of(found, -_ENERGY_SLACK)))
        return _ratio(tail, allowed), _ratio(_norm(new - old), best + allowed)


def _is_share(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value <= 1


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _rounding_norm(values: Tensor, dtype: torch.dtype) -> float:
    """Frobenius norm of half an ulp of each element in its storage dtype."""
    facts = torch.finfo(dtype)
    half = (values.abs() * facts.eps / 2).clamp(min=facts.smallest_normal * facts.eps / 2)
    return _norm(half)


def _ratio(value: float, allowed: float) -> float:
    if value == 0.0:
        return 0.0
    return value / allowed if allowed else math.inf
