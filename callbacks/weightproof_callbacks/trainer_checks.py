"""What `GuardCallback` refuses, with the sentence it refuses it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weightproof.errors import InputError
from weightproof.weights import iter_weight_matrices

if TYPE_CHECKING:
    from torch import nn


def require_positive(name: str, value: object) -> None:
    """Refuse anything but a whole number of steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of steps, 1 or more, not {value!r}")


def checked_edits(edits: Mapping[int, Any] | None) -> dict[int, Any]:
    """The schedule as a dict, after refusing what is no step and what is no edit."""
    if edits is None:
        return {}
    if not isinstance(edits, Mapping):
        raise InputError(f"edits must map a global step to an edit, such as {{500: RTN(8)}}, not {edits!r}")
    for step, edit in edits.items():
        require_positive("a step in edits", step)
        missing = [name for name in ("plan", "selects") if not callable(getattr(edit, name, None))]
        if missing:
            raise InputError(
                f"edits[{step}] has no {missing[0]}(): {edit!r} is no edit, use one such as weightproof.edits.RTN"
            )
    return dict(edits)


def require_edits_that_apply(edits: Mapping[int, Any], model: nn.Module) -> None:
    """Refuse, before any training, an edit that would find nothing to change."""
    matrices = [matrix for matrix in iter_weight_matrices(model) if matrix.refusal is None]
    for step, edit in edits.items():
        if not any(edit.selects(matrix) for matrix in matrices):
            raise InputError(
                f"edits[{step}] ({edit.name}) selects no weight matrix of this model: check its include= and exclude="
            )
