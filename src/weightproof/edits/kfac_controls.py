"""Controls for K-FAC editing: as much of each matrix is kept, chosen by something else than curvature.

Any damage of this size makes a model forget: an edit that is said to forget one thing and keep the rest is to be
compared, at the same recall, with these.

| control | what is kept |
| --- | --- |
| random | pairs of the same eigenbases drawn from a seed, as many as K-FAC keeps |
| inverse | as many pairs of the smallest curvature |
| svd | the leading singular components that take as many parameters, r (d_out + d_in) of them |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightproof.edits.kfac import DEFAULT_TARGETS, KFAC
from weightproof.edits.selection import Selection
from weightproof.errors import InputError
from weightproof.kinds import Plain
from weightproof.numerics.low_rank import directions
from weightproof.numerics.matrices import seeded_generator
from weightproof.types import WeightMatrix

CONTROLS = ("random", "inverse", "svd")


@dataclass(frozen=True, eq=False)
class KFACControl(Selection):
    """Keep as much of each matrix as a K-FAC edit does, chosen in another way.

    Attributes:
        edit: The K-FAC edit that is compared with.
        control: One of `CONTROLS`.
        seed: Of the random pairs.

    Raises:
        InputError: If the control is unknown.
    """

    edit: KFAC = field(repr=False)
    control: str
    seed: int = 0
    include: tuple[str, ...] = field(default=DEFAULT_TARGETS, kw_only=True)

    FAMILIES = None

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.control not in CONTROLS:
            raise InputError(f"control must be one of {', '.join(CONTROLS)}, not {self.control!r}")

    @property
    def name(self) -> str:
        """`<edit>-<control>`."""
        return f"{self.edit.name}-{self.control}"

    @property
    def kind(self) -> Plain:
        """No promise: outputs decide."""
        return Plain("unknown")

    def params(self) -> dict[str, Any]:
        """The control and the parameters of the edit that it stands beside."""
        return {"control": self.control, "seed": self.seed, "beside": self.edit.params()}

    def selects(self, matrix: WeightMatrix) -> bool:
        """What the edit selects."""
        return self.edit.selects(matrix)

    def unmatched(self, matrices: Any) -> tuple[str, ...]:
        """What the edit could not match."""
        return self.edit.unmatched(matrices)

    def prepare(self, session: Any) -> KFACControl:
        """Prove that the factors are of this model."""
        self.edit.prepare(session)
        return self

    def plan(self, matrix: WeightMatrix, context: object = None) -> Tensor | None:
        """The matrix (d_out, d_in) in its storage dtype; None when it stays as it is. Pure."""
        if not self.selects(matrix) or self.edit.energy_of(matrix.name) == 1.0:
            return None
        weight = matrix.load().detach()
        kept = round(self.edit.read(matrix).kept_pairs * weight.numel())
        if self.control == "svd":
            return _truncated(weight, kept)
        bases = self.edit.bases(matrix.name)
        left, right = bases.gradient.vectors, bases.activation.vectors
        coefficients = left.T @ weight.to(left.dtype) @ right
        if self.control == "random":
            saliency = torch.rand(weight.shape, generator=seeded_generator("kfac control", matrix.name, self.seed))
        else:
            saliency = -(bases.gradient.values[:, None] * bases.activation.values)
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[saliency.flatten().topk(kept).indices.cpu()] = True
        mask = chosen.view(weight.shape).to(coefficients.device)
        return (left @ torch.where(mask, coefficients, 0.0) @ right.T).to(weight.dtype)


def _truncated(weight: Tensor, parameters: int) -> Tensor:
    rank = max(1, round(parameters / sum(weight.shape)))
    return directions(weight).projected(weight, min(rank, *weight.shape)).to(weight.dtype)
