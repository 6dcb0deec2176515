"""Which pairs of curvature directions carry a given share of the curvature.

With Kronecker factors G = U_G diag(lambda) U_G' of the output gradients and A = U_A diag(mu) U_A' of the inputs, the
curvature of a weight matrix along u_i v_j' is lambda_i mu_j (Martens and Grosse 2015, arXiv:1503.05671). Pairs are
kept from the largest down until their sum reaches `energy` times the whole, and pairs of equal curvature are kept or
left together: no other rule is independent of the basis that an eigensolver happens to return.

For products lambda_i mu_j the kept set is a staircase: row i keeps its first c_i columns, and c_i does not increase.
It is found by bisection over the threshold, in O(p log q) a step, without sorting the p q products or holding a mask
of that size. Saliencies that are no such products (`ragged`) are bisected by sums over blocks of rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from weightproof.errors import InputError

__all__ = ["RaggedMask", "StaircaseMask", "check_energy", "ragged", "staircase"]

logger = logging.getLogger("weightproof")

# Curvatures that agree to this share are ties, and a sum this close to its goal has reached it: eigenvalues carry
# rounding of this order (float64, a few thousand dimensions).
TIE = 1e-12

# Enough halvings of the exponent's range, then of the mantissa, of a float64.
_STEPS = 80

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class StaircaseMask:
    """Row i keeps columns 0 to counts[i] - 1, rows and columns in descending order of their eigenvalues.

    Attributes:
        counts: (p,) int64, non-increasing.
        kept_mass: Share of the sum of lambda_i mu_j that is kept, 0 to 1.
    """

    counts: torch.Tensor
    kept_mass: float

    @property
    def kept_pairs(self) -> int:
        """How many pairs are kept."""
        return int(self.counts.sum())

    @property
    def rows(self) -> int:
        """Rows that keep anything: as many leading eigenvectors of G are needed."""
        return int((self.counts > 0).sum())

    @property
    def columns(self) -> int:
        """Columns that are kept in any row: as many leading eigenvectors of A are needed."""
        return int(self.counts[0]) if self.counts.numel() else 0

    def zero_outside(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Zero what is not kept, in place; (rows, columns) leading coefficients."""
        columns = torch.arange(coefficients.shape[1], device=coefficients.device)
        for block, counts in _blocks(coefficients, self.counts[: coefficients.shape[0]].to(coefficients.device)):
            block.masked_fill_(columns >= counts[:, None], 0.0)
        return coefficients


@dataclass(frozen=True)
class RaggedMask:
    """Pairs whose saliency is at least `threshold`.

    Attributes:
        threshold: In the units of the saliency, the tolerance for ties already taken off.
        kept_mass: Share of the sum of the saliencies that is kept, 0 to 1.
        kept_pairs: How many pairs are kept.
    """

    threshold: float
    kept_mass: float
    kept_pairs: int


def check_energy(energy: object) -> float:
    """The share as a float.

    Raises:
        InputError: If it is no number from 0 to 1.
    """
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0.0 <= energy <= 1.0:
        raise InputError(f"energy is the share of the curvature to keep, a number from 0 to 1, not {energy!r}")
    return float(energy)


def staircase(gradient_values: torch.Tensor, activation_values: torch.Tensor, energy: float) -> StaircaseMask:
    """The smallest set of pairs of largest curvature whose sum is at least `energy` of the whole; ties together.

    Args:
        gradient_values: Eigenvalues of G, (p,) descending, not negative.
        activation_values: Eigenvalues of A, (q,) descending, not negative.
        energy: Share to keep, 0 to 1. 0 keeps nothing, 1 everything; everything is kept as well, with a warning,
            where there is no curvature at all.

    Raises:
        InputError: If `energy` is out of range, or the values are not finite, negative or not in descending order.

    Example:
        >>> values = torch.tensor([4.0, 1.0]), torch.tensor([3.0, 1.0])    # products 12 4 / 3 1
        >>> staircase(*values, 0.7).counts.tolist()
        [2, 0]
    """
    energy = check_energy(energy)
    lam, mu = (_checked(values, what) for values, what in ((gradient_values, "G"), (activation_values, "A")))
    prefix = torch.cat([mu.new_zeros(1), mu.cumsum(0)])
    total = float(lam.sum() * prefix[-1])
    everything = torch.full((len(lam),), len(mu), dtype=torch.int64)
    if energy == 0.0:
        return StaircaseMask(torch.zeros_like(everything), 0.0)
    if energy >= 1.0 or total == 0.0:
        if energy < 1.0:
            logger.warning("the factors hold no curvature at all, so nothing was removed")
        return StaircaseMask(everything, 1.0)
    ascending = mu.flip(0).contiguous()

    def counts_at(threshold: float) -> torch.Tensor:
        bound = torch.where(lam > 0, threshold / lam, math.inf)
        return len(mu) - torch.searchsorted(ascending, bound)

    def mass_of(counts: torch.Tensor) -> float:
        return float((lam * prefix[counts]).sum())

    def next_below(counts: torch.Tensor) -> float:
        """The largest product that is not among the first `counts` of its row."""
        rest = torch.where(counts < len(mu), lam * mu[counts.clamp(max=len(mu) - 1)], 0.0)
        return float(rest.max())

    goal = energy * total * (1.0 - TIE)
    counts = _descend(float(lam[0] * mu[0]), goal, counts_at, mass_of, next_below)
    return StaircaseMask(counts, min(1.0, mass_of(counts) / total))


def _descend(
    largest: float,
    goal: float,
    counts_at: Callable[[float], torch.Tensor],
    mass_of: Callable[[torch.Tensor], float],
    next_below: Callable[[torch.Tensor], float],
) -> torch.Tensor:
    """Counts at the largest threshold that reaches the goal: bisection, then class of ties by class of ties."""
    high, low = math.log2(largest) + 1.0, math.log2(largest) - 1.0
    while mass_of(counts_at(2.0**low)) < goal and low > -1070:
        high, low = low, low - 2.0 * (high - low)
    for _ in range(_STEPS):
        middle = (high + low) / 2
        if middle in (high, low):
            break
        if mass_of(counts_at(2.0**middle)) < goal:
            high = middle
        else:
            low = middle
    counts = counts_at(2.0**high)
    while mass_of(counts) < goal:
        below = next_below(counts)
        if below <= 0.0:
            break  # what is left has no curvature
        counts = counts_at(below * (1.0 - TIE))
    return counts


def ragged(blocks: Callable[[], Iterator[torch.Tensor]], energy: float) -> RaggedMask:
    """The same rule for saliencies that are no products of row and column values.

    Args:
        blocks: Gives the saliencies anew at each call, in blocks of any shape, float64, not negative. It is called
            six times.
        energy: Share to keep, above 0 and below 1.

    Raises:
        InputError: If `energy` is out of range or a saliency is not finite.
    """
    energy = check_energy(energy)
    total = 0.0
    for block in blocks():
        if not torch.isfinite(block).all():
            raise InputError("saliencies hold NaN or inf: check the weights and the factors")
        total += float(block.sum())
    if total == 0.0:
        return RaggedMask(0.0, 1.0, sum(block.numel() for block in blocks()))
    threshold = _ragged_threshold(blocks, energy * total * (1.0 - TIE)) * (1.0 - TIE)
    kept, pairs = 0.0, 0
    for block in blocks():
        chosen = block >= threshold
        kept, pairs = kept + float((block * chosen).sum()), pairs + int(chosen.sum())
    return RaggedMask(threshold, min(1.0, kept / total), pairs)


_DIGIT = 16


def _ragged_threshold(blocks: Callable[[], Iterator[torch.Tensor]], goal: float) -> float:
    """The saliency at which the sum of all that are not smaller first reaches the goal.

    Numbers that are not negative are ordered as their bits are, so the threshold is found digit by digit, the most
    significant first: exact, in four passes, without a sort.
    """
    prefix, above = 0, 0.0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        sums = torch.zeros(1 << _DIGIT, dtype=torch.float64)
        for block in blocks():
            values = block.to("cpu", torch.float64).flatten()
            bits = values.view(torch.int64)
            if shift + _DIGIT < 64:
                inside = (bits >> (shift + _DIGIT)) == prefix
                values, bits = values[inside], bits[inside]
            sums.scatter_add_(0, (bits >> shift) & ((1 << _DIGIT) - 1), values)
        descending = sums.flip(0)
        reached = above + descending.cumsum(0)
        occupied = descending.nonzero().flatten()
        found = int(torch.searchsorted(reached, goal))
        # Rounding of the sums may put the goal a hair before the first or behind the last value.
        found = min(max(found, int(occupied[0])), int(occupied[-1]))
        above = float(reached[found] - descending[found])
        prefix = (prefix << _DIGIT) | ((1 << _DIGIT) - 1 - found)
    return float(torch.tensor(prefix, dtype=torch.int64).view(torch.float64))


def _blocks(coefficients: torch.Tensor, counts: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    step = max(1, _BLOCK_ELEMENTS // max(1, coefficients.shape[1]))
    for start in range(0, coefficients.shape[0], step):
        yield coefficients[start : start + step], counts[start : start + step]


def _checked(values: torch.Tensor, what: str) -> torch.Tensor:
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or values.numel() == 0 or not torch.isfinite(values).all():
        raise InputError(f"the eigenvalues of {what} must be a vector of finite numbers")
    if float(values.min()) < 0.0 or bool((values.diff() > 0).any()):
        raise InputError(f"the eigenvalues of {what} must not be negative and must be in descending order")
    return values
