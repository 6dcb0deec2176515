"""Measure: model -> frozen readings. Nothing here judges and nothing here writes.

`read_state` reads everything (the baseline); `change_readings` only what a change touched.

One process and many take this one path. Matrices are dealt to owners by cost and the readings are gathered to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm.auto import tqdm

from weightproof.collective import Processes
from weightproof.numerics.gram import needs_float64
from weightproof.parallel.shards import Part, dealt
from weightproof.readings.circuits import config_of, read_circuits, vectors_of
from weightproof.readings.matrices import (
    fit_reading,
    no_bulk,
    read_exactly,
    refused,
)
from weightproof.readings.tensors import common_refusals, common_structure, digest_of, read_tensors
from weightproof.types import (
    BulkFit,
    BulkReading,
    CircuitReading,
    ContractReading,
    MatrixReading,
    Readings,
    StructureReading,
    TensorReading,
    WeightMatrix,
)
from weightproof.weights import iter_weight_matrices

NO_CIRCUITS = "the model has no attention and no MLP of a known kind"


@dataclass(frozen=True)
class State:
    """Readings of one moment with the fits behind them (`fits` only where counted exactly)."""

    readings: Readings
    fits: Mapping[str, BulkFit] = field(default_factory=dict)


def exact_cost(matrix: WeightMatrix) -> float:
    """Work of an exact spectrum, in multiplications of the Gram matrix in float32.

    Gram matrix, eigenvalues and passes over the elements as measured on a CPU (docs/scaling.md). On a
    GPU the eigenvalues cost more of the whole; sides and dtype still put the matrices in the same order.
    """
    side, length = sorted((matrix.d_out, matrix.d_in))
    gram, eigenvalues = (2.3, 8.5) if needs_float64(side, length, matrix.dtype) else (1.0, 5.0)
    return side * (gram * side * length + eigenvalues * side**2 + 250.0 * length)


def screen_cost(matrix: WeightMatrix) -> float:
    """Work of a screen: a few reads."""
    return float(matrix.d_out) * matrix.d_in


def common_matrices(model: torch.nn.Module, processes: Processes) -> list[WeightMatrix]:
    """Every matrix of the model; what one process cannot read is refused on all, for one reason."""
    every = list(iter_weight_matrices(model))
    refusals = common_refusals({one.name: one.refusal for one in every if one.refusal is not None}, processes)
    return [replace(one, refusal=refusals[one.name]) if one.name in refusals else one for one in every]


def read_state(
    model: torch.nn.Module,
    tensors: Mapping[str, TensorReading] | None = None,
    *,
    processes: Processes | None = None,
    progress: bool = False,
) -> State:
    """Read every tensor (unless given as `tensors`, just read), matrix and spectrum of a model exactly."""
    processes = processes or Processes.alone()
    tensors = read_tensors(model, {}, (), processes) if tensors is None else tensors
    every = common_matrices(model, processes)
    state = state_of(every, tensors, common_structure(model, None, processes), processes, progress=progress)
    return with_circuits(state, read_circuits(every, vectors_of(model, processes), config_of(model), processes))


def with_circuits(state: State, circuits: Mapping[str, CircuitReading], otherwise: str = NO_CIRCUITS) -> State:
    """The state with its circuits, or with the reason why there are none."""
    unmeasured = dict(state.readings.unmeasured)
    if not circuits:
        unmeasured["circuits"] = otherwise
    return State(replace(state.readings, circuits=circuits, unmeasured=unmeasured), state.fits)


def state_of(
    every: Sequence[WeightMatrix],
    tensors: Mapping[str, TensorReading],
    structure: StructureReading,
    processes: Processes,
    *,
    progress: bool = False,
) -> State:
    """Read the spectrum of every matrix exactly, wherever the matrices come from (a model, a folder).

    Args:
        every: All matrices, those that are refused too.
        tensors: Readings of the tensors that they lie in.
        structure: The structure that goes with them.
        processes: Who takes part.
        progress: Show a bar where somebody watches a terminal.
    """
    readable = [matrix for matrix in every if matrix.refusal is None]
    hidden = None if progress and processes.is_main else True  # None: shown where somebody watches a terminal
    with tqdm(total=len(readable), desc="spectra", unit="matrix", disable=hidden, leave=False, delay=1.0) as bar:

        def work(matrix: WeightMatrix, weight: torch.Tensor) -> Findings:
            found = read_whole(matrix, weight)
            bar.update(processes.size)  # the others are as far
            return found

        exact = dealt(processes, readable, cost=exact_cost, parts=(values_of,), work=work, operation="spectra")
    found = dict(zip((matrix.name for matrix in readable), exact, strict=True))
    return assembled(every, tensors, found, structure)


@dataclass(frozen=True)
class Findings:
    """What the owner of a matrix reports of it; the last two where a change was read."""

    matrix: MatrixReading
    bulk: BulkReading
    fit: BulkFit | None = None
    relative_delta: float | None = None
    contract: tuple[ContractReading, ...] = ()


def read_whole(matrix: WeightMatrix, weight: torch.Tensor) -> Findings:
    """Its exact spectrum and the fit of its bulk."""
    return Findings(read_exactly(matrix, weight), *fit_reading(matrix, weight))


def values_of(matrix: WeightMatrix) -> Part:
    """What this process has of a matrix, for `dealt`."""
    return matrix.load if matrix.shard is None else matrix.shard


def assembled(
    every: Sequence[WeightMatrix],
    tensors: Mapping[str, TensorReading],
    found: Mapping[str, Findings],
    structure: StructureReading,
) -> State:
    """All readings in the order of the model; a refused matrix has its reason instead."""
    matrices: dict[str, MatrixReading] = {}
    bulks: dict[str, BulkReading] = {}
    for matrix in every:
        one = found.get(matrix.name)
        reason = matrix.refusal or "it was not read"
        matrices[matrix.name] = one.matrix if one else refused(matrix, "refused", reason)
        bulks[matrix.name] = one.bulk if one else no_bulk(matrix, reason)
    readings = Readings(
        model_digest=digest_of(tensors),
        tensors=tensors,
        structure=structure,
        matrices=matrices,
        bulks=bulks,
        unmeasured={} if matrices else {"matrices": "the model has no weight matrix"},
        untrained=untrained_names(matrices, bulks),
    )
    return State(readings, {name: one.fit for name, one in found.items() if one.fit is not None})


def untrained_names(matrices: Mapping[str, MatrixReading], bulks: Mapping[str, BulkReading]) -> frozenset[str]:
    """Matrices that carry no learned structure yet: zero, pure bulk, or without a spectrum."""
    return frozenset(
        name for name, reading in matrices.items() if not reading.frobenius_norm or bulks[name].pure_bulk is not False
    )


def looks_untrained(readings: Readings) -> bool:
    """True when spectra were measured and every one of them is a pure Marchenko-Pastur bulk."""
    known = [bulk.pure_bulk for bulk in readings.bulks.values() if bulk.pure_bulk is not None]
    return bool(known) and all(known)
