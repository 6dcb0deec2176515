"""The kind of a change that a quantizer's own storage tells: which matrices it packed, on which grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from weightproof.contracts.quantities import count_altered, incomparable, relative_change
from weightproof.families import clean_name
from weightproof.folders.readers import PackedWeight, packed_weights
from weightproof.kinds import Quantize, typical_quantization_error
from weightproof.types import ContractReading

# Backends whose integer grids are those of the largest magnitude in each group, rounded to nearest: held to the
# rigorous bound. Others search or learn their grids, push errors on, or have uneven ones: held to typical sizes.
_ROUND_TO_NEAREST = frozenset({"torchao"})
_WIDEST = 16


@dataclass(frozen=True)
class Grid:
    """How one matrix is stored: by which backend, in how many bits, how many inputs to a scale (None: not known)."""

    backend: str
    bits: int | None
    group_size: int | None


def stored_grids(model: nn.Module) -> dict[str, Grid]:
    """Matrix name -> how a quantizer stores it."""
    return {
        clean_name(placed.raw(placed.found.name)): Grid(
            placed.found.backend, placed.found.bits, placed.found.group_size
        )
        for placed in packed_weights(model)
        if isinstance(placed.found, PackedWeight)
    }


@dataclass(frozen=True)
class StoredQuantize:
    """Some matrices were packed by a quantizer, nothing else changed.

    Attributes:
        grids: Matrix name -> how it is stored now.
    """

    grids: Mapping[str, Grid]

    name = "quantize"

    def params(self) -> dict[str, Any]:
        """Backends, widths and the number of matrices."""
        return {
            "backend": ", ".join(sorted({grid.backend for grid in self.grids.values()})),
            "bits": ", ".join(sorted({str(grid.bits or "unknown") for grid in self.grids.values()})),
            "matrices": len(self.grids),
        }

    def measure(self, name: str, before: Tensor, after: Tensor) -> tuple[ContractReading, ...]:
        """Of a packed matrix, its error against its grid, or against what is typical; others must not change."""
        grid = self.grids.get(name)
        reason = incomparable(before, after)
        if grid is None:
            value = None if reason else count_altered(before, after)[0] / max(1, before.numel())
            why = reason or ("it changed, and no quantizer stores it" if value else None)
            # Some methods scale what comes before the weights that they quantize (AWQ), so this is only unusual.
            return (ContractReading(name, "altered_fraction", value, 0.0, rigorous=False, reason=why),)
        if grid.backend in _ROUND_TO_NEAREST and grid.bits is not None and 2 <= grid.bits <= _WIDEST:
            granularity = "channel" if grid.group_size is None else "group"
            return Quantize(grid.bits, granularity, grid.group_size).measure(name, before, after)
        limit = typical_quantization_error(grid.bits or 3)
        value = None if reason else relative_change(before, after)
        reason = reason or ("the matrix was zero" if value is None else None)
        return (ContractReading(name, "relative_error", value, limit, rigorous=False, reason=reason),)

    def measure_outside(self, name: str, before: Tensor, after: Tensor) -> tuple[ContractReading, ...]:
        """A bias, norm or buffer that changed beside the packed weights: unusual."""
        why = "it changed beside the quantised weights"
        return (ContractReading(name, "altered_outside_matrices", 1.0, 0.0, rigorous=False, reason=why),)
