"""Round-to-nearest quantization, simulated: rounded values are written back in the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightproof.edits.grids import range_of, steps_of
from weightproof.edits.selection import Selection
from weightproof.kinds import Quantize, check_grid
from weightproof.types import WeightMatrix

# Rows are handled in chunks, a few of which fit a cache: a few MiB exist beside the result.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class RTN(Selection):
    """Absmax round-to-nearest quantization (simulated), symmetric or with a zero point.

    With Delta_g = max |w| / (2^(bits-1) - 1) over a scale group g, every weight becomes
    Delta_g * round(w / Delta_g) (ties to even), computed in float32 (float64 for float64 weights)
    and rounded once to the storage dtype. A group of zeros stays zero. 2 bits keep {-Delta, 0, Delta}.
    Asymmetric grids span [min(w, 0), max(w, 0)] with all 2^bits levels (see `weightproof.edits.grids`).

    Attributes:
        bits: 2 to 8.
        granularity: One scale per "channel" (a row of (d_out, d_in)), per "tensor" or per "group".
        group_size: Consecutive inputs per scale for "group"; the last group of a row may be shorter.
        symmetric: Levels around 0; False adds a whole zero point, better for skewed groups and few bits.
        include: See `weightproof.edits.selection.Selection`.
        exclude: Globs that win over `include`.

    Raises:
        InputError: If a parameter is out of range.

    Example:
        >>> RTN(bits=4, granularity="group", group_size=64).name
        'rtn-int4-group64'
    """

    bits: int
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Validate the parameters."""
        check_grid(self.bits, self.granularity, self.group_size, max_bits=8)
        super().__post_init__()

    @property
    def name(self) -> str:
        """`rtn-int<bits>-<granularity>`, with the group size for groups, and `-asym` with a zero point."""
        return f"rtn-int{self.bits}-{self.granularity}{self.group_size or ''}{'' if self.symmetric else '-asym'}"

    @property
    def kind(self) -> Quantize:
        """The contract: at most 2^bits levels per group, errors within half a step."""
        return Quantize(self.bits, self.granularity, self.group_size)

    def params(self) -> dict[str, Any]:
        """All parameters, ready for JSON."""
        grid = {"bits": self.bits, "granularity": self.granularity, "group_size": self.group_size}
        return {**grid, "symmetric": self.symmetric, **self.selection_params()}

    def plan(self, matrix: WeightMatrix, context: object = None) -> torch.Tensor | None:
        """The quantized matrix (d_out, d_in) in its storage dtype; None when it is not selected.

        Pure: reads `matrix.load()`, writes nothing. NaN and inf in a group make the group NaN; they
        are never hidden.
        """
        if not self.selects(matrix):
            return None
        weight = matrix.load()
        if weight.numel() == 0:
            return None
        whole = torch.aminmax(weight) if self.granularity == "tensor" else None
        rounded = torch.empty_like(weight)
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rounded[start : start + step] = self._round_rows(weight[start : start + step], whole)
        return rounded

    def _round_rows(self, rows: torch.Tensor, whole: Sequence[torch.Tensor] | None) -> torch.Tensor:
        """Quantize some rows; `whole` is the matrix's range for one scale per tensor."""
        work = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if whole is not None:
            low, high = whole
            return (
                steps_of(low.to(work), high.to(work), self.bits, symmetric=self.symmetric).nearest(work).to(rows.dtype)
            )
        width = work.shape[1] if self.group_size is None else min(self.group_size, work.shape[1])
        edge = work.shape[1] - work.shape[1] % width
        # All whole groups of all rows at once, then the shorter one at the end of each row.
        parts = [self._round_groups(work[:, :edge].reshape(-1, width)).view(-1, edge)]
        if edge < work.shape[1]:
            parts.append(self._round_groups(work[:, edge:]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(rows.dtype)

    def _round_groups(self, groups: torch.Tensor) -> torch.Tensor:
        """Quantize groups (number, width), each with a scale of its own."""
        return steps_of(*range_of(groups), self.bits, symmetric=self.symmetric).nearest(groups)
