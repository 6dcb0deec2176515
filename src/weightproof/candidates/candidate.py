"""What a candidate subspace is, and what it is built from.

A candidate is a guess of a few directions of the residual stream, made without looking at the change that it is held
against; `weightproof.subspace` says how much of the change lies in it. A ceiling is made from the change itself: no
guess can do better on its side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from weightproof.candidates.captures import Captures
    from weightproof.candidates.weight_side import WeightSide
    from weightproof.deltas import Delta

T = TypeVar("T")

WEIGHTS = "weights"
NEEDS = frozenset({"weights", "clean", "contrast", "attention", "mlp", "delta"})
AXIS_KINDS = ("write", "mixed", "read", "ceiling")


@dataclass(frozen=True)
class Sources:
    """What candidates are built from.

    Attributes:
        weights: The matrices of the base model, by what they read and write.
        captures: Activations of the base model on prompts; None where there are no prompts.
        delta: The change that is looked at; only ceilings may use it.
        rank: Columns of a candidate.
        broad_rank: Columns of a subspace that is projected out of another.
    """

    weights: WeightSide
    captures: Captures | None = None
    delta: Delta | None = None
    rank: int = 8
    broad_rank: int = 64
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()` the first time, what it gave after that: for what several candidates or layers share.

        What depends on the weights alone has a key that is a tuple with `WEIGHTS` in front: it outlives other prompts
        and other changes (`again`).
        """
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def basis(self, candidate: Candidate, layer: int) -> Tensor | str:
        """What `candidate.build` gives for a layer, built once."""
        kind = WEIGHTS if candidate.needs == {WEIGHTS} else "made"
        return self.once((kind, candidate.name, layer), lambda: candidate.build(self, layer))

    def again(self, captures: Captures | None, delta: Delta | None) -> Sources:
        """The same model with other activations, or another change: what was made of the weights is kept."""
        kept = {key: value for key, value in self._known.items() if isinstance(key, tuple) and key[0] == WEIGHTS}
        return replace(self, captures=captures, delta=delta, _known=kept)


@dataclass(frozen=True)
class Candidate:
    """One way to guess a subspace of the residual stream.

    Attributes:
        name: As in the tables, such as `mlp_up_read`.
        family: Where it comes from, such as "W:read" or "act:clean".
        axis_kind: "write" or "read" for what the weights write to or read from the stream, "mixed" for what is
            neither alone, "ceiling" for what is made from the change itself.
        needs: What of the sources it uses: of "weights", "clean", "contrast", "attention", "mlp", "delta".
        build: From the sources and a layer to an orthonormal (d_model, <= rank) float64 basis; or, as text, why there
            is none in this model.
    """

    name: str
    family: str
    axis_kind: str
    needs: frozenset[str]
    build: Callable[[Sources, int], Tensor | str]
