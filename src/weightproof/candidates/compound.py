"""Candidates that join two others: half-way between them, or all that both span."""

from __future__ import annotations

from torch import Tensor

from weightproof.candidates import shapes
from weightproof.candidates.activation_side import ACTIVATION_SIDE
from weightproof.candidates.candidate import Candidate, Sources
from weightproof.candidates.from_weights import WEIGHT_SIDE
from weightproof.subspace import union

_PARTS = {one.name: one for one in (*WEIGHT_SIDE, *ACTIVATION_SIDE)}


def _both(sources: Sources, layer: int, *names: str) -> list[Tensor] | str:
    """The bases of two candidates, or why one of them is not there."""
    found = {name: sources.basis(_PARTS[name], layer) for name in names}
    missing = [f"{name}: {basis}" for name, basis in found.items() if isinstance(basis, str)]
    return missing[0] if missing else [basis for basis in found.values() if isinstance(basis, Tensor)]


def qk_x_chars_clusters(sources: Sources, layer: int) -> Tensor | str:
    """Half-way between `qk_circuit` and `chars_clusters`: sums of their principal vectors."""
    bases = _both(sources, layer, "qk_circuit", "chars_clusters")
    return bases if isinstance(bases, str) else shapes.bisector(bases[0], bases[1], sources.rank)


def wnr_union_task_diff(sources: Sources, layer: int) -> Tensor | str:
    """What `write_not_downstream_read` and `TaskDiff_contrast` span together: up to twice the rank of others."""
    bases = _both(sources, layer, "write_not_downstream_read", "TaskDiff_contrast")
    return bases if isinstance(bases, str) else union(*bases, rank=2 * sources.rank)


def _needs(*names: str) -> frozenset[str]:
    return frozenset().union(*(_PARTS[name].needs for name in names))


COMPOUND: tuple[Candidate, ...] = (
    Candidate("qk_x_chars_clusters", "compound", "mixed", _needs("qk_circuit", "chars_clusters"), qk_x_chars_clusters),
    Candidate(
        "WNR_union_TaskDiff",
        "compound",
        "mixed",
        _needs("write_not_downstream_read", "TaskDiff_contrast"),
        wnr_union_task_diff,
    ),
)
