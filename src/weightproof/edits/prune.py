"""Magnitude pruning: the smallest weights become 0, the others stay exactly what they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightproof import kinds
from weightproof.collective import Processes
from weightproof.edits.magnitudes import digit_counts, dropped, kth_smallest, magnitude_dtype
from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices

_N_OF_M = re.compile(r"(\d+):(\d+)")


class GlobalCut(NamedTuple):
    """One threshold for all matrices: what is below it goes, and of each matrix so many of those that equal it.

    `changed` are the matrices that lose an element by it.
    """

    threshold: float
    dtype: torch.dtype
    ties: Mapping[str, int]
    changed: frozenset[str]


@dataclass(frozen=True)
class Prune(Selection):
    """Set the smallest magnitudes to 0; of equal ones those that come first in row-major order of (d_out, d_in).

    Exactly floor(sparsity * n + 1/2) of n elements are 0 afterwards, or more where more were 0 before. "N:M"
    keeps the N largest of every M consecutive inputs of a row, as sparse tensor cores want it (2:4).
    A NaN is never pruned: it would be hidden.

    Attributes:
        sparsity: Share of zeros, from 0 to 1 (open at 0). May be left out for N:M, where it is 1 - N/M.
        pattern: "unstructured", or "N:M" such as "2:4".
        scope: "matrix": every matrix reaches the sparsity. "global": one threshold over all selected matrices,
            found by `prepare`, and only all of them together reach it.
        include: See `weightproof.edits.selection.Selection`.
        exclude: Globs that win over `include`.
        cut: What `prepare` found for the scope "global"; no parameter.

    Raises:
        InputError: If a parameter is out of range, or pattern and sparsity contradict each other.

    Example:
        >>> Prune(0.5).name, Prune(pattern="2:4").name
        ('prune-50%', 'prune-2:4')
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: str = "matrix"
    cut: GlobalCut | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the parameters; N:M fixes the sparsity."""
        super().__post_init__()
        if self.scope not in ("matrix", "global"):
            raise InputError(f"scope must be 'matrix' or 'global', not {self.scope!r}")
        if self.group is not None:
            object.__setattr__(self, "sparsity", self._sparsity_of_group(*self.group))
        given = self.sparsity
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= 1:
            raise InputError(f"sparsity must be a share above 0 and at most 1 (not percent), not {given!r}")

    def _sparsity_of_group(self, kept: int, of: int) -> float:
        if not 0 < kept < of:
            raise InputError(f"pattern {self.pattern!r} must keep at least 1 and fewer than all, as '2:4' does")
        if self.scope == "global":
            raise InputError(
                f"pattern {self.pattern!r} prunes each group by itself: scope 'global' has no meaning for it"
            )
        share = 1 - kept / of
        if self.sparsity is not None and self.sparsity != share:
            raise InputError(
                f"pattern {self.pattern!r} is a sparsity of {share:g}, not {self.sparsity!r}: leave it out"
            )
        return share

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern; None when unstructured.

        Raises:
            InputError: If the pattern is neither.
        """
        if self.pattern == "unstructured":
            return None
        match = _N_OF_M.fullmatch(str(self.pattern))
        if match is None:
            raise InputError(f"pattern must be 'unstructured' or N:M such as '2:4', not {self.pattern!r}")
        return int(match[1]), int(match[2])

    @property
    def share(self) -> float:
        """The sparsity as a number."""
        return float(self.sparsity or 0.0)

    @property
    def name(self) -> str:
        """`prune-<percent>%`, with `-global`; `prune-N:M`."""
        if self.group is not None:
            return f"prune-{self.pattern}"
        return f"prune-{100 * self.share:g}%{'-global' if self.scope == 'global' else ''}"

    @property
    def kind(self) -> kinds.Prune:
        """The contract: every element is 0 or unchanged, and enough of them are 0."""
        return kinds.Prune(self.share, "model" if self.scope == "global" else "matrix")

    def params(self) -> dict[str, Any]:
        """All parameters, ready for JSON."""
        own = {"sparsity": self.sparsity, "pattern": self.pattern, "scope": self.scope}
        return {**own, **self.selection_params()}

    def concerns(self, matrix: WeightMatrix) -> bool:
        """Whether the threshold over all matrices takes anything from `matrix`, once that is known."""
        return self.cut is None or not self.cut.changed or matrix.name in self.cut.changed

    # -- seeing the model first ------------------------------------------------------------------

    def prepare(self, session: Any) -> Prune:
        """This edit with the threshold of the scope "global", and the shapes of N:M checked; weights untouched.

        Sharded matrices are counted where their parts lie; what travels are histograms.

        Args:
            session: With `model` and `processes`.

        Raises:
            InputError: If a selected matrix's width is not a multiple of M.
        """
        chosen = [matrix for matrix in iter_weight_matrices(session.model) if self.selects(matrix)]
        for matrix in chosen:
            self._require_width(matrix)
        if self.scope != "global" or not chosen:
            return self
        return self.knowing(cut=_global_cut(chosen, self.share, session.processes))

    def _require_width(self, matrix: WeightMatrix) -> None:
        if self.group is not None and matrix.d_in % self.group[1]:
            raise InputError(
                f"{matrix.name} has {matrix.d_in} inputs, which is not a multiple of {self.group[1]}: pattern "
                f"{self.pattern!r} does not fit it. Leave it out with exclude=({matrix.name!r},), or prune unstructured"
            )

    # -- masks and values ------------------------------------------------------------------------

    def mask(self, before: WeightMatrix | Tensor) -> Tensor:
        """True where an element is kept, (d_out, d_in); to be held during training.

        Args:
            before: The matrix, or its values (not for scope "global", which goes by the matrix's name).

        Raises:
            InputError: If the width does not fit the pattern, or a global edit was not prepared.
        """
        matrix = None if isinstance(before, Tensor) else before
        weight = before if isinstance(before, Tensor) else before.load()
        if self.group is not None:
            if matrix is not None:
                self._require_width(matrix)
            return ~_dropped_of_groups(weight, *self.group)
        dtype = magnitude_dtype(weight.dtype)
        if self.scope == "matrix":
            count = _count_of(self.share, weight.numel())
            if not count:
                return torch.ones_like(weight, dtype=torch.bool)
            found = kth_smallest(count, dtype, lambda shift, prefix: digit_counts(weight, dtype, shift, prefix))
            return ~dropped(weight, dtype, *found)
        if self.cut is None or matrix is None or matrix.name not in self.cut.ties:
            raise InputError(
                f"{self.name!r} has one threshold over all matrices and does not know it for "
                f"{'a bare tensor' if matrix is None else matrix.name}: prepare it first (session.apply does)"
            )
        return ~dropped(weight, self.cut.dtype, self.cut.threshold, self.cut.ties[matrix.name])

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """The pruned matrix (d_out, d_in); None when it is not selected. Pure.

        Raises:
            InputError: As `mask`.
        """
        if not self.selects(matrix):
            return None
        weight = matrix.load()
        return torch.where(self.mask(matrix), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _count_of(share: float, size: int) -> int:
    """How many of `size` elements become 0."""
    return min(size, math.floor(share * size + 0.5))


def _dropped_of_groups(weight: Tensor, kept: int, of: int) -> Tensor:
    """All but the `kept` largest of every `of` consecutive columns; of equal ones the first go. Bool, (d_out, d_in)."""
    if weight.shape[1] % of:
        raise InputError(f"{weight.shape[1]} inputs are not a multiple of {of}: pattern '{kept}:{of}' does not fit")
    size = weight.abs().reshape(weight.shape[0], -1, of)
    broken = size.isnan()
    parts = torch.where(broken, torch.inf, size).unbind(-1)
    drop = torch.empty_like(broken)
    for place, mine in enumerate(parts):
        # How many of the others go first: the smaller ones, and the equal ones on the left.
        ahead = torch.zeros_like(mine, dtype=torch.int16)
        for other, theirs in enumerate(parts):
            if other != place:
                ahead += theirs <= mine if other < place else theirs < mine
        drop[..., place] = ahead < of - kept
    return (drop & ~broken).view(weight.shape)


def _global_cut(matrices: Sequence[WeightMatrix], share: float, processes: Processes) -> GlobalCut:
    """The threshold below which so large a share of all elements lies, and the ties that each matrix gives up."""
    dtype = magnitude_dtype(*(matrix.dtype for matrix in matrices))
    operation = "counting magnitudes over all matrices"

    def added(counts: Tensor) -> Tensor:
        return processes.sum(operation, [counts])[0]

    def count(shift: int, prefix: int) -> Tensor:
        with processes.together(operation):
            ours = torch.zeros(1 << 16, dtype=torch.int64)
            for index, matrix in enumerate(matrices):
                part = _counted_here(matrix, index, processes)
                if part is not None:
                    ours = ours + digit_counts(part, dtype, shift, prefix)
        return added(ours)

    wanted = _count_of(share, sum(matrix.d_out * matrix.d_in for matrix in matrices))
    threshold, left = kth_smallest(wanted, dtype, count) if wanted else (0.0, 0)
    with processes.together(operation):
        found = torch.zeros(2, len(matrices), dtype=torch.int64)
        for index, matrix in enumerate(matrices):
            part = _counted_here(matrix, index, processes)
            if part is not None:
                size = part.to(dtype).abs()
                found[0, index] = int((size == threshold).sum())
                found[1, index] = int(((size < threshold) & (size > 0)).sum())
    ties: dict[str, int] = {}
    changed: set[str] = set()
    equal, below = added(found).tolist()
    for index, matrix in enumerate(matrices):
        ties[matrix.name] = min(left, equal[index])
        left -= ties[matrix.name]
        if below[index] or (ties[matrix.name] and threshold > 0):
            changed.add(matrix.name)
    return GlobalCut(threshold, dtype, ties, frozenset(changed))


def _counted_here(matrix: WeightMatrix, index: int, processes: Processes) -> Tensor | None:
    """What this process counts of a matrix: its part, or all of one that every process holds and that it was dealt."""
    if matrix.shard is not None:
        return matrix.shard.local
    return matrix.load() if index % processes.size == processes.rank else None
