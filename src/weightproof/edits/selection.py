"""Which matrices an edit changes: globs on names and families, the same for every edit."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Self

from weightproof.errors import InputError
from weightproof.types import WeightMatrix

# Linear maps inside the blocks. Embeddings, heads, routers, convolutions and matrices of unknown
# use are small or fragile, and quantizers leave them alone unless told otherwise.
DEFAULT_FAMILIES = ("attn", "ffn", "expert")

# Of a bias or a norm seen as an n x 1 matrix (`weightproof.judgement.plans.vectors`).
VECTOR_FAMILY = "vector"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Choice of matrices; every edit inherits it.

    Attributes:
        include: Globs on matrix names or families. Globs range over attention, feed-forward and
            expert matrices; any other matrix is chosen only by its exact name, or by the exact name
            of its family, such as "head". Edits that carry values of their own for each tensor
            (task arithmetic, merges) range over all of them.
        exclude: Globs on matrix names or families that win over `include`.

    Raises:
        InputError: If a pattern is no string, or `include` is empty.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    FAMILIES: ClassVar[tuple[str, ...] | None] = DEFAULT_FAMILIES  # over which globs range; None: over all

    def __post_init__(self) -> None:
        """Validate the patterns; a single glob may be given as a string."""
        for field in ("include", "exclude"):
            object.__setattr__(self, field, _patterns(getattr(self, field), field))
        if not self.include:
            raise InputError("include is empty, so nothing would be changed; leave it out for the default")

    def selects(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` is changed: measured, of concern to the edit, included and not excluded."""
        labels = _labels(matrix)
        if not self._eligible(matrix) or any(fnmatchcase(label, glob) for glob in self.exclude for label in labels):
            return False
        return any(self._chooses(pattern, matrix) for pattern in self.include)

    def unmatched(self, matrices: Iterable[WeightMatrix]) -> tuple[str, ...]:
        """The patterns of `include` that choose none of these matrices: misspelt, or meant for another model."""
        eligible = [matrix for matrix in matrices if self._eligible(matrix)]
        return tuple(one for one in self.include if not any(self._chooses(one, matrix) for matrix in eligible))

    def concerns(self, matrix: WeightMatrix) -> bool:
        """Whether the edit has anything to do with `matrix`; edits that carry values of their own narrow it."""
        return True

    def knowing(self, **found: object) -> Self:
        """A copy that knows what was found in the model: fields that are no parameters of the edit."""
        known = copy.copy(self)
        for field, value in found.items():
            object.__setattr__(known, field, value)
        return known

    def _eligible(self, matrix: WeightMatrix) -> bool:
        return matrix.refusal is None and self.concerns(matrix)

    def selection_params(self) -> dict[str, list[str]]:
        """`include` and `exclude`, ready for JSON."""
        return {"include": list(self.include), "exclude": list(self.exclude)}

    def _chooses(self, pattern: str, matrix: WeightMatrix) -> bool:
        labels = _labels(matrix)
        if pattern in labels:
            return True
        in_range = self.FAMILIES is None or matrix.family in self.FAMILIES
        return in_range and any(fnmatchcase(label, pattern) for label in labels)


def _labels(matrix: WeightMatrix) -> tuple[str, str]:
    return matrix.name, matrix.family


def _patterns(given: object, field: str) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"{field} must be a glob or a tuple of globs on matrix names or families, not {given!r}")
    return tuple(patterns)
