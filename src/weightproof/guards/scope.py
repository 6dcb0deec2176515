"""Which tensors an edit changed, and which of them its declared targets cover."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import final

from weightproof.types import EditRecord, Readings


def changed_tensors(before: Readings, after: Readings, edit: EditRecord) -> tuple[str, ...]:
    """Names whose digest, dtype or shape differs, that appeared or went, or that the snapshot found changed.

    The parts of a packed weight (codes, scales) are named as the matrix that they store.
    """
    changed = set(edit.changed_names)
    for name in {*before.tensors, *after.tensors}:
        then, now = before.tensors.get(name), after.tensors.get(name)
        if then is None or now is None or (then.digest, then.dtype, then.shape) != (now.digest, now.dtype, now.shape):
            changed.add(name)
    packed = {name: reading.part_of for tensors in (before.tensors, after.tensors) for name, reading in tensors.items()}
    return tuple(sorted({packed.get(name) or name for name in changed}))


@final
class Scope:
    """The tensors that targets cover: by a glob on a name, with or without `.weight`, or by family.

    Tied names count as one tensor. A target that equals a name matches it even where the name holds
    brackets (`experts.gate_up_proj[3]`), which a glob would read as a set of characters; the target
    of one slice covers the stacked tensor that it lies in.
    """

    def __init__(self, readings: Readings) -> None:
        self._ties = {name: group for group in readings.structure.ties for name in group}
        self._families: dict[str, set[str]] = {}
        for matrix in readings.matrices.values():
            stack = matrix.name.rpartition("[")[0]
            for name in (matrix.name, f"{matrix.name}.weight", *([stack] if stack else [])):
                self._families.setdefault(name, set()).add(matrix.family)

    def covers(self, name: str, targets: tuple[str, ...]) -> bool:
        """Whether any of the targets covers the tensor of this name."""
        names = {name, *self._ties.get(name, ())}
        spellings = {spelling for each in names for spelling in _spellings(each)}
        exact = spellings.union(*(self._families.get(each, ()) for each in names))
        return any(
            target in exact
            or target.rpartition("[")[0] in names
            or any(fnmatch.fnmatchcase(spelling, target) for spelling in spellings)
            for target in targets
        )


def _spellings(name: str) -> Iterator[str]:
    yield name
    if name.endswith(".weight"):
        yield name.removesuffix(".weight")
