"""Steering as an edit: W + alpha D for good, planned, written by the snapshot and judged by the guards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from weightproof import kinds
from weightproof.alpha.fitting import fitted, moved, require_alpha, require_base
from weightproof.deltas import Delta, LowRank
from weightproof.differences.factors import Part, scaled_part
from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.lora.deltas import AdapterDelta
from weightproof.types import WeightMatrix
from weightproof.weights import iter_weight_matrices


@dataclass(frozen=True, eq=False)
class Steer(Selection):
    """W + alpha D for every matrix of a delta, in float32 (float64 for float64 weights), rounded once.

    Attributes:
        delta: A `Delta`, or the path of one, or of a PEFT adapter.
        alpha: How much of it. 0 changes nothing and is refused: an edit that changes nothing has nothing to judge.
        same_base: False: add it to other weights than it was made for, too.
        include: Globs on names or families, over every matrix of the delta.
        exclude: Globs that win over `include`.

    Raises:
        InputError: The delta cannot be read, or alpha is 0 or no finite number.

    Example:
        >>> import torch
        >>> Steer(Delta({"0.weight": torch.ones(2, 3)}), 0.5).name
        'steer-0.5'
    """

    delta: Delta | Path | str
    alpha: float = 1.0
    same_base: bool = True
    content: Delta = field(init=False, repr=False)

    FAMILIES: ClassVar[tuple[str, ...] | None] = None

    def __post_init__(self) -> None:
        """Read the delta."""
        super().__post_init__()
        object.__setattr__(self, "alpha", require_alpha(self.alpha))
        if self.alpha == 0.0:
            raise InputError("alpha is 0, which changes nothing: give how much of the delta is to be added")
        given = self.delta
        object.__setattr__(self, "content", given if isinstance(given, Delta) else Delta.load(given))

    @property
    def name(self) -> str:
        """`steer-<alpha>`."""
        return f"steer-{self.alpha:g}"

    @property
    def kind(self) -> kinds.LoraMerge:
        """The contract of a merge: every matrix grew by alpha D, once, within the rounding of its dtype."""
        declared = {name: _declared(name, part, self.alpha) for name, part in self.content.parts.items()}
        return kinds.LoraMerge(declared, about=self._about())

    def params(self) -> dict[str, Any]:
        """What was added and how much of it, ready for JSON."""
        return {**self._about(), "same_base": self.same_base, **self.selection_params()}

    def _about(self) -> dict[str, Any]:
        metadata = self.content.metadata
        made = {"mode": metadata["mode"], "source": metadata["source"], "base": metadata["base"].get("name")}
        return {"alpha": self.alpha, "delta": {**made, "digest": self.content.digest}}

    def prepare(self, session: Any) -> Steer:
        """This edit, if its delta belongs to the model.

        Raises:
            InputError: An unknown name, another shape, NaN or inf in the delta, or weights it was not made for.
        """
        targets = fitted(self.content, iter_weight_matrices(session.model))
        if self.same_base:
            require_base(self.content, targets, lambda matrix: matrix.load())
        chosen = {matrix.name: part for matrix, part in targets if self.selects(matrix)}
        if len(chosen) in (0, len(self.content.parts)):
            return self
        # The contract is about what is changed: nothing is expected of a matrix that `exclude` leaves out.
        return self.knowing(content=Delta(chosen, self.content.metadata))

    def concerns(self, matrix: WeightMatrix) -> bool:
        """Whether the delta changes this matrix."""
        return self._part(matrix) is not None

    def _part(self, matrix: WeightMatrix) -> Part | None:
        names = (matrix.name, *matrix.tied_names)
        return next((self.content.parts[name] for name in names if name in self.content.parts), None)

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """W + alpha D (d_out, d_in) in the storage dtype; None where the delta changes nothing. Pure."""
        part = self._part(matrix) if self.selects(matrix) else None
        if part is None:
            return None
        before = matrix.load()
        return moved(before, part, self.alpha).to(before.dtype)


def steer(delta: Delta | Path | str, alpha: float = 1.0, *, same_base: bool = True) -> Steer:
    """The edit W + alpha D, for `session.apply`.

    Raises:
        InputError: The delta cannot be read, or alpha is 0 or no finite number.
    """
    return Steer(delta, alpha, same_base)


def _declared(name: str, part: Part, alpha: float) -> Tensor | AdapterDelta:
    if isinstance(part, LowRank):
        return AdapterDelta(name, part.right, part.left, alpha)
    scaled = scaled_part(part, alpha)
    assert isinstance(scaled, Tensor)
    return scaled
