"""Round-to-nearest quantization, simulated: rounded values are written back in the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from weightproof.errors import InputError
from weightproof.kinds import Quantize, check_grid
from weightproof.types import WeightMatrix

# Linear maps inside the blocks. Embeddings, heads, routers, convolutions and matrices of unknown
# use are small or fragile, and quantizers leave them alone unless told otherwise.
DEFAULT_FAMILIES = ("attn", "ffn", "expert")

# Rows are handled in chunks, a few of which fit a cache: a few MiB exist beside the result.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class RTN:
    """Symmetric absmax round-to-nearest quantization (simulated).

    With Delta_g = max |w| / (2^(bits-1) - 1) over a scale group g, every weight becomes
    Delta_g * round(w / Delta_g) (ties to even), computed in float32 (float64 for float64 weights)
    and rounded once to the storage dtype. A group of zeros stays zero. 2 bits keep {-Delta, 0, Delta}.

    Attributes:
        bits: 2 to 8.
        granularity: One scale per "channel" (a row of (d_out, d_in)), per "tensor" or per "group".
        group_size: Consecutive inputs per scale for "group"; the last group of a row may be shorter.
        include: Globs on matrix names or families. Globs range over attention, feed-forward and
            expert matrices; any other matrix is chosen only by its exact name, or by the exact name
            of its family, such as "head".
        exclude: Globs on matrix names or families that win over `include`.

    Raises:
        InputError: If a parameter is out of range.

    Example:
        >>> RTN(bits=4, granularity="group", group_size=64).name
        'rtn-int4-group64'
    """

    bits: int
    granularity: str = "channel"
    group_size: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate the parameters; a single glob may be given as a string."""
        check_grid(self.bits, self.granularity, self.group_size, max_bits=8)
        for field in ("include", "exclude"):
            object.__setattr__(self, field, _patterns(getattr(self, field), field))
        if not self.include:
            raise InputError("include is empty, so nothing would be quantized; leave it out for the default")

    @property
    def name(self) -> str:
        """`rtn-int<bits>-<granularity>`, with the group size for groups."""
        return f"rtn-int{self.bits}-{self.granularity}{self.group_size or ''}"

    @property
    def kind(self) -> Quantize:
        """The contract: at most 2^bits levels per group, errors within half a step."""
        return Quantize(self.bits, self.granularity, self.group_size)

    def params(self) -> dict[str, Any]:
        """All parameters, ready for JSON."""
        return {
            "bits": self.bits,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    def selects(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` is quantized: measured, included and not excluded."""
        labels = (matrix.name, matrix.family)
        if matrix.refusal is not None or any(fnmatchcase(label, glob) for glob in self.exclude for label in labels):
            return False
        if any(label == pattern for pattern in self.include for label in labels):
            return True
        return matrix.family in DEFAULT_FAMILIES and any(
            fnmatchcase(label, glob) for glob in self.include for label in labels
        )

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
        peak = torch.stack(torch.aminmax(weight)).abs().max() if self.granularity == "tensor" else None
        rounded = torch.empty_like(weight)
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rounded[start : start + step] = self._round_rows(weight[start : start + step], peak)
        return rounded

    def _round_rows(self, rows: torch.Tensor, peak: torch.Tensor | None) -> torch.Tensor:
        """Quantize some rows; `peak` is the matrix's largest magnitude for one scale per tensor."""
        work = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        parts = [
            _round_to_grid(part, part.abs().amax(1, keepdim=True) if peak is None else peak.to(work.dtype), self.bits)
            for part in self._groups(work)
        ]
        return torch.cat(parts, dim=1).to(rows.dtype)

    def _groups(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from (rows,) if self.group_size is None else rows.split(self.group_size, dim=1)


def _round_to_grid(values: torch.Tensor, peak: torch.Tensor, bits: int) -> torch.Tensor:
    """Delta * round(values / Delta) with Delta = peak / (2^(bits-1) - 1); 0 where peak is 0."""
    top = 2 ** (bits - 1) - 1
    delta = peak / top
    delta = torch.where(delta == 0, 1.0, delta)
    return torch.round(values / delta).clamp(-top, top) * delta


def _patterns(given: object, field: str) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"{field} must be a glob or a tuple of globs on matrix names or families, not {given!r}")
    return tuple(patterns)
