"""A matrix that is stored another way than before: by a quantizer, under a mask, or plain again.

Its tensors are others then (codes, scales), which is one change of storage and not so many missing and added tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from weightproof.types import Readings, TensorReading

# Backends that do not round: what kind "prune" may leave, and kind "quantize" may not.
MASKS = frozenset({"prune-mask"})
NOT_QUANTIZERS = MASKS | {"parametrization"}
PLAIN = "plain"

_Parts = Mapping[str, Mapping[str, TensorReading]]


@dataclass(frozen=True, slots=True)
class Repacked:
    """One matrix that is stored another way: what stored it before and now (`PLAIN`: a parameter of its own)."""

    name: str
    before: str
    after: str
    tensors: frozenset[str]

    def is_declared(self, kind: str) -> bool:
        """Whether storing it so is what the declared kind does."""
        if kind == "quantize":
            return self.after not in NOT_QUANTIZERS | {PLAIN}
        return kind == "prune" and {self.before, self.after} <= MASKS | {PLAIN}


def repacked(before: Readings, after: Readings) -> tuple[Repacked, ...]:
    """Every matrix whose tensors are of another backend, name, dtype or shape, and which is still there."""
    then, now = _parts(before), _parts(after)
    return tuple(
        Repacked(
            name, _backend(then, name), _backend(now, name), frozenset({name, *then.get(name, ()), *now.get(name, ())})
        )
        for name in sorted(then.keys() | now.keys())
        if _form(then, name) != _form(now, name)
        if name in now or name in after.tensors
    )


def _parts(readings: Readings) -> dict[str, dict[str, TensorReading]]:
    found: dict[str, dict[str, TensorReading]] = {}
    for name, reading in readings.tensors.items():
        if reading.part_of is not None:
            found.setdefault(reading.part_of, {})[name] = reading
    return found


def _backend(parts: _Parts, name: str) -> str:
    return next((reading.storage for reading in parts.get(name, {}).values()), PLAIN)


def _form(parts: _Parts, name: str) -> dict[str, tuple[object, ...]]:
    return {part: (one.storage, one.dtype, one.shape) for part, one in parts.get(name, {}).items()}


def without(readings: Readings, changes: tuple[Repacked, ...]) -> Readings:
    """The readings without the tensors and module classes that a change of storage explains."""
    if not changes:
        return readings
    explained = {tensor for change in changes for tensor in change.tensors}
    owners = {change.name.rpartition(".")[0] for change in changes}
    structure = readings.structure
    return replace(
        readings,
        tensors={name: one for name, one in readings.tensors.items() if name not in explained},
        structure=replace(
            structure, modules={name: kind for name, kind in structure.modules.items() if name not in owners}
        ),
    )


def reshaped(before: Readings, after: Readings, changes: tuple[Repacked, ...]) -> Iterator[tuple[str, str]]:
    """Of those, the matrices that are of another size now: name, and what became what."""
    for change in changes:
        then, now = before.matrices.get(change.name), after.matrices.get(change.name)
        if then is None or now is None or now.reason is not None:
            continue
        if (then.d_out, then.d_in) != (now.d_out, now.d_in):
            yield change.name, f"{[then.d_out, then.d_in]} became {[now.d_out, now.d_in]}"
