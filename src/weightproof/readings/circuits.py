"""Read the circuits of a model: the parts of each meet on one owner, and only changed ones are read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightproof.circuits import MOST_VALUES, summary
from weightproof.collective import Processes
from weightproof.families import unwrap
from weightproof.parallel.placements import local_of, refusal_of
from weightproof.parallel.shards import Part, dealt, shard_of
from weightproof.readings.circuit_finder import Circuit, find_circuits
from weightproof.readings.tensors import common_refusals
from weightproof.types import CircuitReading, WeightMatrix
from weightproof.weights import iter_tensors

METHOD = "float64"
Kept = Callable[[Circuit, frozenset[str]], CircuitReading | None]
# At most so many matrices and gains in one circuit: gate, up and down; two gains and two norms behind projections.
_MOST_MATRICES, _MOST_VECTORS = 3, 4


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """The config of a model as a mapping; empty where it has none."""
    to_dict = getattr(getattr(unwrap(model), "config", None), "to_dict", None)
    found = to_dict() if callable(to_dict) else {}
    return found if isinstance(found, Mapping) else {}


def read_circuit(circuit: Circuit, tensors: Mapping[str, Tensor]) -> CircuitReading:
    """The reading of one circuit from all of its matrices (d_out, d_in) and gains, by name."""
    if circuit.compute is None:
        return unread(circuit, circuit.reason or "it was not read")
    values: Tensor = circuit.compute(tensors)
    if not bool(torch.isfinite(values).all()):
        return unread(circuit, "one of its matrices or gains holds NaN or inf")
    kept = summary(values, circuit.most or MOST_VALUES)
    method = METHOD if len(kept) == values.numel() else f"{METHOD}, {len(kept)} numbers for {values.numel()} values"
    return CircuitReading(circuit.name, circuit.kind, circuit.matrices, kept, method)


def unread(circuit: Circuit, reason: str) -> CircuitReading:
    """A circuit without values, and why."""
    return CircuitReading(circuit.name, circuit.kind, circuit.matrices, None, "none", reason)


@dataclass(frozen=True, eq=False)
class Vector:
    """A one-dimensional parameter: its length, what this process has of it, and why it cannot be read, if it cannot."""

    size: int
    values: Part
    refusal: str | None = None


def vectors_of(model: nn.Module, processes: Processes) -> dict[str, Vector]:
    """Every one-dimensional parameter of a model by public name; what one process cannot read none can."""
    found = {one.name: one for one in iter_tensors(model) if not one.is_buffer and len(one.shape) == 1}
    refusals = {name: why for name, one in found.items() if (why := refusal_of(one.tensor)) is not None}
    refusals = common_refusals(refusals, processes)
    return {
        name: Vector(one.shape[0], None, refusals[name])
        if name in refusals
        else Vector(one.shape[0], shard_of(one.tensor) or local_of(one.tensor).detach())
        for name, one in found.items()
    }


def read_circuits(
    matrices: Sequence[WeightMatrix],
    vectors: Mapping[str, Vector],
    config: Mapping[str, Any],
    processes: Processes,
    kept: Kept | None = None,
) -> dict[str, CircuitReading]:
    """Every circuit of a model or a folder, the same on every process.

    Args:
        matrices: All matrices, with the refusals common to all processes.
        vectors: All one-dimensional parameters by name.
        config: The model's config as a mapping; may be empty.
        processes: Who takes part.
        kept: Given a circuit and the names of the tensors it is made of, the reading of it that still holds; None
            where it must be read.

    Returns:
        Readings by name, in the order of the model. Empty where nothing looks like attention or an MLP.
    """
    by_name = {one.name: one for one in matrices}
    circuits = find_circuits(matrices, {name: one.size for name, one in vectors.items()}, config)
    found: dict[str, CircuitReading] = {}
    for circuit in circuits:
        stored = frozenset(
            (*(part for name in circuit.matrices for part in by_name[name].tensor_names), *circuit.vectors)
        )
        refused = next((f"{name}: {vectors[name].refusal}" for name in circuit.vectors if vectors[name].refusal), None)
        reading = unread(circuit, refused) if refused else None if kept is None else kept(circuit, stored)
        if reading is not None:
            found[circuit.name] = reading
    missing = [circuit for circuit in circuits if circuit.name not in found]
    readings = _read(missing, by_name, vectors, processes)
    found |= {circuit.name: reading for circuit, reading in zip(missing, readings, strict=True)}
    return {circuit.name: found[circuit.name] for circuit in circuits}


def _read(
    circuits: Sequence[Circuit],
    matrices: Mapping[str, WeightMatrix],
    vectors: Mapping[str, Vector],
    processes: Processes,
) -> list[CircuitReading]:
    """Each circuit on its owner: at most the matrices of one circuit are whole at a time."""

    def matrix_at(index: int, circuit: Circuit) -> Part:
        if circuit.compute is None or index >= len(circuit.matrices):
            return None
        matrix = matrices[circuit.matrices[index]]
        return matrix.load if matrix.shard is None else matrix.shard

    def vector_at(index: int, circuit: Circuit) -> Part:
        if circuit.compute is None or index >= len(circuit.vectors):
            return None
        return vectors[circuit.vectors[index]].values

    def work(circuit: Circuit, *parts: Tensor | None) -> CircuitReading:
        weights, gains = parts[:_MOST_MATRICES], parts[_MOST_MATRICES:]
        here = dict(zip(circuit.matrices, weights, strict=False)) | dict(zip(circuit.vectors, gains, strict=False))
        return read_circuit(circuit, {name: tensor for name, tensor in here.items() if tensor is not None})

    slots = [(matrix_at, _MOST_MATRICES), (vector_at, _MOST_VECTORS)]
    return dealt(
        processes,
        circuits,
        cost=lambda circuit: sum(float(matrices[name].d_out) * matrices[name].d_in for name in circuit.matrices),
        parts=[partial(part_at, index) for part_at, count in slots for index in range(count)],
        work=work,
        operation="circuits",
    )
