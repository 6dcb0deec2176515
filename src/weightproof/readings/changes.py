"""Measure a change: a changed model -> frozen readings, only of what the change touched.

Tensors are compared with the snapshot bit for bit; what did not change keeps its reading. `changed_matrices` reads the
others. Nothing here judges and nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from weightproof.collective import Processes
from weightproof.kinds import Kind, Plain, expected_names
from weightproof.parallel.shards import dealt
from weightproof.probes import Findings, State, assembled, common_matrices, exact_cost, values_of, with_circuits
from weightproof.readings.changed_matrices import Job, Originals, differs_from_plan, read_jobs
from weightproof.readings.circuit_finder import Circuit
from weightproof.readings.circuits import config_of, read_circuits, vectors_of
from weightproof.readings.matrices import fit_reading, norm_limit
from weightproof.readings.tensors import common_structure, read_tensors
from weightproof.snapshot import Snapshot
from weightproof.types import (
    BulkReading,
    CircuitReading,
    ContractReading,
    Readings,
    StructureReading,
    TensorReading,
    WeightMatrix,
)


@dataclass(frozen=True)
class ChangeScope:
    """How closely to look at a change.

    Attributes:
        norm_band: Family -> half-width, in log units, of the band around the baseline's spectral
            norm that the ladder must decide.
        count_slack: Family and its spike count -> how many spikes Weyl bounds may leave open in the
            whole family before spectra are taken.
        bulk_names: Matrices whose spike count is refreshed (None: every changed one).
        touched: Names of the tensors that differ from the snapshot, on any process.
        stray: Tensors whose state in the snapshot is not the one last read: no delta to start from.
        kind: What the change declared; its contract is measured on every touched matrix.
        planned: Digests of what an edit of ours meant to write, by matrix name.
        norm_names: Matrices whose norm is read to `norm_band`; None: every changed one.
        coarse_band: The band of the others.
    """

    norm_band: Callable[[str], float]
    count_slack: Callable[[str, int], int]
    bulk_names: Collection[str] | None
    touched: frozenset[str]
    stray: frozenset[str] = frozenset()
    kind: Kind = field(default_factory=Plain)
    planned: Mapping[str, str] = field(default_factory=dict)
    norm_names: Collection[str] | None = None
    coarse_band: float = 0.0

    def band_of(self, matrix: WeightMatrix) -> float:
        """The band that the ladder must decide for a matrix."""
        is_close = self.norm_names is None or matrix.name in self.norm_names
        return self.norm_band(matrix.family) if is_close else self.coarse_band

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that are not as they were last read."""
        return self.touched | self.stray


@dataclass(frozen=True)
class Change:
    """A changed model: its readings, and what was measured of the change itself, by matrix."""

    state: State
    relative_delta: Mapping[str, float | None]
    contract: tuple[ContractReading, ...]


def read_change(  # noqa: PLR0913 - the two states, the change and who reads it
    model: torch.nn.Module,
    snapshot: Snapshot,
    current: State,
    baseline: State,
    scope: ChangeScope,
    *,
    processes: Processes | None = None,
) -> Change:
    """Read a changed model; what did not change keeps its reading of `current`."""
    processes = processes or Processes.alone()
    tensors = read_tensors(model, current.readings.tensors, scope.changed, processes)
    every = common_matrices(model, processes)
    structure = common_structure(model, current.readings.structure, processes)
    change = change_of(every, tensors, structure, snapshot, current, baseline, scope, processes)
    if scope.kind.name == "train":  # reported there, judged nowhere: not worth its time in every window
        return replace(change, state=with_circuits(change.state, {}, "they are not read in windows of training"))
    kept = kept_circuits(tensors, current, baseline, scope)
    circuits = read_circuits(every, vectors_of(model, processes), config_of(model), processes, kept)
    return replace(change, state=with_circuits(change.state, circuits))


def kept_circuits(
    tensors: Mapping[str, TensorReading], current: State, baseline: State, scope: ChangeScope
) -> Callable[[Circuit, frozenset[str]], CircuitReading | None]:
    """For `read_circuits`: the readings that still hold, because none of the tensors of a circuit changed."""

    def kept(circuit: Circuit, stored: frozenset[str]) -> CircuitReading | None:
        known = current.readings.circuits.get(circuit.name)
        if known is None or known.matrices != circuit.matrices or stored & scope.changed:
            known = baseline.readings.circuits.get(circuit.name)  # an earlier change was undone
            then = baseline.readings.tensors
            if any(name not in then or then[name].digest != tensors[name].digest for name in stored):
                return None
        return known if known is not None and known.matrices == circuit.matrices else None

    return kept


def change_of(  # noqa: PLR0913, PLR0917 - the two states, the change and who reads it
    every: Sequence[WeightMatrix],
    tensors: Mapping[str, TensorReading],
    structure: StructureReading,
    originals: Originals,
    current: State,
    baseline: State,
    scope: ChangeScope,
    processes: Processes,
) -> Change:
    """Read the matrices of a change, wherever they come from (a model, a folder).

    Args:
        every: All matrices as they are now.
        tensors: Readings of all tensors as they are now.
        structure: The structure as it is now.
        originals: The matrices before the change.
        current: The readings before the change.
        baseline: What the change is judged against.
        scope: How closely to look.
        processes: Who takes part.
    """
    found: dict[str, Findings] = {}
    jobs: list[Job] = []
    expected = expected_names(scope.kind)
    for matrix in every:
        kept = _kept(matrix, tensors, current, baseline, scope)
        if kept is not None:
            found[matrix.name] = kept
        asked = (
            not scope.touched.isdisjoint(matrix.tensor_names) or matrix.name in scope.planned or matrix.name in expected
        )
        if matrix.refusal is None and (kept is None or asked):
            jobs.append(_job(matrix, current, baseline, scope, stale=kept is None))
    read = read_jobs(jobs, originals, scope.kind, processes)
    deltas = {job.matrix.name: read[job.matrix.name].relative_delta for job in jobs if job.touched}
    contract = [reading for job in jobs for reading in read[job.matrix.name].contract]
    contract += [differs_from_plan(name, differs=True) for name in scope.planned if name not in read]
    found |= {job.matrix.name: read[job.matrix.name] for job in jobs if job.stale}
    _settle_counts(every, found, scope, processes)
    return Change(assembled(every, tensors, found, structure), deltas, tuple(contract))


def _kept(
    matrix: WeightMatrix, tensors: Mapping[str, TensorReading], current: State, baseline: State, scope: ChangeScope
) -> Findings | None:
    """The readings that still hold of a matrix; None when it must be read."""
    name = matrix.name
    known = name in current.readings.matrices and scope.changed.isdisjoint(matrix.tensor_names)
    state = current if known else None
    if state is None and _is_as_in(baseline.readings, matrix, tensors):
        state = baseline  # an earlier change was undone
    if state is None:
        return None
    return Findings(state.readings.matrices[name], state.readings.bulks[name], state.fits.get(name))


def _job(matrix: WeightMatrix, current: State, baseline: State, scope: ChangeScope, *, stale: bool) -> Job:
    name = matrix.name
    known = current.readings.matrices.get(name)
    bulk = current.readings.bulks.get(name)
    return Job(
        matrix=matrix,
        stale=stale,
        touched=not scope.touched.isdisjoint(matrix.tensor_names),
        tracked=known is not None and scope.stray.isdisjoint(matrix.tensor_names),
        wants_bulk=scope.bulk_names is None or name in scope.bulk_names or bulk is None,
        known=known,
        limit=norm_limit(baseline.readings.matrices.get(name), scope.band_of(matrix)),
        fit=current.fits.get(name),
        bulk=bulk,
        planned=scope.planned.get(name),
    )


def _settle_counts(
    every: Sequence[WeightMatrix], found: dict[str, Findings], scope: ChangeScope, processes: Processes
) -> None:
    """Take the spectra without which a family's spike count would stay too open."""
    unsettled = _open_counts({name: one.bulk for name, one in found.items()}, scope)
    matrices = [matrix for matrix in every if matrix.name in unsettled]
    fits = dealt(
        processes, matrices, cost=exact_cost, parts=(values_of,), work=fit_reading, operation="open spike counts"
    )
    for matrix, (bulk, fit) in zip(matrices, fits, strict=True):
        one = found[matrix.name]
        found[matrix.name] = Findings(one.matrix, bulk, fit, one.relative_delta, one.contract)


def _is_as_in(readings: Readings, matrix: WeightMatrix, tensors: Mapping[str, TensorReading]) -> bool:
    """Whether a matrix is bit for bit, and oriented, as it was when `readings` were taken."""
    known = readings.matrices.get(matrix.name)
    for stored in matrix.tensor_names:
        then, now = readings.tensors.get(stored), tensors.get(stored)
        if then is None or now is None or (then.digest, then.part_of) != (now.digest, now.part_of):
            return False
    if known is None:
        return False
    return (known.d_out, known.d_in) == (matrix.d_out, matrix.d_in)


def _open_counts(bulks: Mapping[str, BulkReading], scope: ChangeScope) -> frozenset[str]:
    """Matrices whose spectrum must be taken so that no family's spike count is left too open.

    Widest intervals first: those settle most for one spectrum.
    """
    chosen: set[str] = set()
    for family in {bulk.family for bulk in bulks.values()}:
        members = [bulk for bulk in bulks.values() if bulk.family == family and bulk.num_spikes is not None]
        widths = {bulk.name: (bulk.num_spikes_high or 0) - (bulk.num_spikes_low or 0) for bulk in members}
        left = sum(widths.values())
        slack = scope.count_slack(family, sum(bulk.num_spikes or 0 for bulk in members))
        for name in sorted(widths, key=lambda key: widths[key], reverse=True):
            if left <= slack:
                break
            chosen.add(name)
            left -= widths[name]
    return frozenset(chosen)
