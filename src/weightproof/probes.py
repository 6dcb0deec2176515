"""Measure: model -> frozen readings. Nothing here judges and nothing here writes.

`read_state` reads everything (the baseline). `read_change` reads only what a change touched, by
the cheapest route that settles the question: tensors by bitwise comparison with the snapshot,
spectral norms by the delta ladder, spike counts by Weyl's inequality, exact spectra only where
those leave the answer open.

One process and many take this one path. Matrices are dealt to owners by cost and the readings are
gathered to all. Of a sharded model, a change that promises nothing of single elements is screened
where the shards lie (`lockstep`); else the parts of a matrix travel to its owner, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from tqdm.auto import tqdm

from weightproof.circuit_finder import Circuit
from weightproof.circuit_readings import config_of, read_circuits, vectors_of
from weightproof.collective import Processes
from weightproof.contracts import relative_change
from weightproof.gram import needs_float64
from weightproof.kinds import Kind, Plain, expected_names
from weightproof.lockstep import Screened, ScreenRequest, screen
from weightproof.matrix_readings import (
    bound_reading,
    fit_reading,
    no_bulk,
    norm_limit,
    norm_reference,
    read_bulk,
    read_exactly,
    read_tracked,
    reading_of,
    refused,
)
from weightproof.shards import Part, Shard, dealt
from weightproof.snapshot import Snapshot, tensor_digest
from weightproof.tensor_readings import common_refusals, common_structure, digest_of, read_tensors
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
    """

    norm_band: Callable[[str], float]
    count_slack: Callable[[str, int], int]
    bulk_names: Collection[str] | None
    touched: frozenset[str]
    stray: frozenset[str] = frozenset()
    kind: Kind = field(default_factory=Plain)
    planned: Mapping[str, str] = field(default_factory=dict)

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

        def work(matrix: WeightMatrix, weight: torch.Tensor) -> _Exact:
            found = _Exact(read_exactly(matrix, weight), *fit_reading(matrix, weight))
            bar.update(processes.size)  # the others are as far
            return found

        exact = dealt(processes, readable, cost=exact_cost, parts=(values_of,), work=work, operation="spectra")
    found = dict(zip((matrix.name for matrix in readable), exact, strict=True))
    return _state(every, tensors, found, structure)


@dataclass(frozen=True)
class _Exact:
    """What the owner of a matrix reports of it."""

    matrix: MatrixReading
    bulk: BulkReading
    fit: BulkFit | None = None
    relative_delta: float | None = None
    contract: tuple[ContractReading, ...] = ()


def values_of(matrix: WeightMatrix) -> Part:
    """What this process has of a matrix, for `dealt`."""
    return matrix.load if matrix.shard is None else matrix.shard


def _state(
    every: Sequence[WeightMatrix],
    tensors: Mapping[str, TensorReading],
    found: Mapping[str, _Exact],
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


# ---------------------------------------------------------------- a change


class Originals(Protocol):
    """Whoever keeps the matrices as they were before a change: a snapshot, or the folder of a base model."""

    def original_matrix(self, matrix: WeightMatrix) -> torch.Tensor | None:
        """The matrix of this name before the change, (d_out, d_in); None where there was none."""
        ...

    def original_shard(self, matrix: WeightMatrix) -> torch.Tensor | Shard | None:
        """The same, or the part of it that lay here."""
        ...


@dataclass(frozen=True, eq=False)
class _Job:
    """One matrix to look at after a change, and what is known of it.

    `stale`: its readings are not those of now. `tracked`: the snapshot holds the values that `known`
    and `fit` were read from. `wants_bulk`: its spike count is refreshed.
    """

    matrix: WeightMatrix
    stale: bool
    touched: bool
    tracked: bool
    wants_bulk: bool
    known: MatrixReading | None
    limit: tuple[float, float] | None
    fit: BulkFit | None
    bulk: BulkReading | None


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
    found: dict[str, _Exact] = {}
    jobs: list[_Job] = []
    expected = expected_names(scope.kind)
    for matrix in every:
        kept = _kept(matrix, tensors, current, baseline, scope)
        if kept is not None:
            found[matrix.name] = kept
        asked = matrix.tensor_name in scope.touched or matrix.name in scope.planned or matrix.name in expected
        if matrix.refusal is None and (kept is None or asked):
            jobs.append(_job(matrix, current, baseline, scope, stale=kept is None))
    read = _read_jobs(jobs, originals, scope, processes)
    deltas = {job.matrix.name: read[job.matrix.name].relative_delta for job in jobs if job.touched}
    contract = [reading for job in jobs for reading in read[job.matrix.name].contract]
    contract += [_differs_from_plan(name, differs=True) for name in scope.planned if name not in read]
    found |= {job.matrix.name: read[job.matrix.name] for job in jobs if job.stale}
    _settle_counts(every, found, scope, processes)
    return Change(_state(every, tensors, found, structure), deltas, tuple(contract))


def _kept(
    matrix: WeightMatrix, tensors: Mapping[str, TensorReading], current: State, baseline: State, scope: ChangeScope
) -> _Exact | None:
    """The readings that still hold of a matrix; None when it must be read."""
    name = matrix.name
    state = current if name in current.readings.matrices and matrix.tensor_name not in scope.changed else None
    if state is None and _is_as_in(baseline.readings, matrix, tensors):
        state = baseline  # an earlier change was undone
    if state is None:
        return None
    return _Exact(state.readings.matrices[name], state.readings.bulks[name], state.fits.get(name))


def _job(matrix: WeightMatrix, current: State, baseline: State, scope: ChangeScope, *, stale: bool) -> _Job:
    name = matrix.name
    known = current.readings.matrices.get(name)
    bulk = current.readings.bulks.get(name)
    return _Job(
        matrix=matrix,
        stale=stale,
        touched=matrix.tensor_name in scope.touched,
        tracked=known is not None and matrix.tensor_name not in scope.stray,
        wants_bulk=scope.bulk_names is None or name in scope.bulk_names or bulk is None,
        known=known,
        limit=norm_limit(baseline.readings.matrices.get(name), scope.norm_band(matrix.family)),
        fit=current.fits.get(name),
        bulk=bulk,
    )


def _read_jobs(
    jobs: Sequence[_Job], originals: Originals, scope: ChangeScope, processes: Processes
) -> dict[str, _Exact]:
    """Readings of every job: screened on the shards where that is enough, by owners where it is not."""
    screened = [job for job in jobs if _can_be_screened(job, scope)]
    found = _screened(screened, originals, processes)
    owned = [job for job in jobs if not _can_be_screened(job, scope)]

    def before(job: _Job) -> Part:
        if not job.touched:
            return None
        if job.matrix.shard is not None:
            return originals.original_shard(job.matrix)
        return lambda: originals.original_matrix(job.matrix)  # on the owner alone: it may lie on disk

    def work(job: _Job, weight: torch.Tensor, original: torch.Tensor | None) -> _Exact:
        return _read_owned(job, weight, original, scope)

    parts = (lambda job: values_of(job.matrix), before)
    read = dealt(
        processes, owned, cost=lambda job: screen_cost(job.matrix), parts=parts, work=work, operation="changed matrices"
    )
    return found | {job.matrix.name: one for job, one in zip(owned, read, strict=True)}


def _read_owned(job: _Job, weight: torch.Tensor, original: torch.Tensor | None, scope: ChangeScope) -> _Exact:
    """Everything about one changed matrix from its whole values, now and in the snapshot."""
    matrix, name = job.matrix, job.matrix.name
    reading = refused(matrix, "unread", "its readings did not change") if job.known is None else job.known
    bulk = job.bulk or no_bulk(matrix, "its spikes were not counted")
    fit = None
    if job.stale:
        tracked = original if job.tracked else None
        reading = read_tracked(matrix, weight, tracked, job.known, job.limit)
        if job.wants_bulk:
            bulk = no_bulk(matrix, reading.reason) if reading.reason else bulk
            if not reading.reason:
                bulk, fit = read_bulk(matrix, weight, tracked, job.fit)
    contract: list[ContractReading] = []
    # What a change must do is asked of matrices that it left alone, too: these are their own originals.
    then = original if job.touched else weight if name in expected_names(scope.kind) else None
    if then is not None and then.shape == weight.shape:
        contract += scope.kind.measure(name, then, weight)
    if name in scope.planned:
        contract.append(_differs_from_plan(name, differs=tensor_digest(weight) != scope.planned[name]))
    delta = relative_delta(weight, original) if job.touched else None
    return _Exact(reading, bulk, fit, delta, tuple(contract))


def _differs_from_plan(name: str, *, differs: bool) -> ContractReading:
    """Whether our own edit wrote something else than it planned."""
    return ContractReading(name, "differs_from_plan", float(differs), 0.0, rigorous=True)


def _can_be_screened(job: _Job, scope: ChangeScope) -> bool:
    """Whether vectors that travel instead of the matrix settle what is asked of it."""
    shard = job.matrix.shard
    if shard is None or shard.layout == "flat" or job.limit is None or not job.stale or not job.tracked:
        return False
    spikes_are_bounded = not job.wants_bulk or (job.fit is not None and job.fit.row_scale is not None)
    return spikes_are_bounded and isinstance(scope.kind, Plain) and job.matrix.name not in scope.planned


def _screened(jobs: Sequence[_Job], originals: Originals, processes: Processes) -> dict[str, _Exact]:
    """Readings from the shards where they lie; what the screen cannot decide is read exactly by owners."""
    if not jobs:
        return {}
    seen = screen(processes, [_request(job, originals) for job in jobs])
    found = {job.matrix.name: _of_screen(job, one) for job, one in zip(jobs, seen, strict=True)}
    opened = [job for job, one in zip(jobs, seen, strict=True) if one.norm is None and not one.profile.num_nonfinite]
    unfitted = [job for job, one in zip(jobs, seen, strict=True) if _lacks_bound(job, one)]
    matrices = [job.matrix for job in jobs if job in opened or job in unfitted]
    exact = dealt(processes, matrices, cost=exact_cost, parts=(values_of,), work=_read_whole, operation="open matrices")
    for matrix, one in zip(matrices, exact, strict=True):
        screened = found[matrix.name]
        refit = any(job.matrix is matrix for job in unfitted)
        found[matrix.name] = _Exact(
            one.matrix, one.bulk if refit else screened.bulk, one.fit if refit else None, screened.relative_delta
        )
    return found


def _read_whole(matrix: WeightMatrix, weight: torch.Tensor) -> _Exact:
    return _Exact(read_exactly(matrix, weight), *fit_reading(matrix, weight))


def _lacks_bound(job: _Job, one: Screened) -> bool:
    return job.wants_bulk and one.whitened_delta is None and not one.profile.num_nonfinite


def _request(job: _Job, originals: Originals) -> ScreenRequest:
    shard, fit = job.matrix.shard, job.fit if job.wants_bulk else None
    before = originals.original_shard(job.matrix)
    assert shard is not None  # only sharded matrices are screened
    return ScreenRequest(
        name=job.matrix.name,
        now=shard,
        before=before if isinstance(before, Shard) and before.shape == shard.shape else None,
        reference=norm_reference(job.known),
        limit=job.limit,
        row_scale=None if fit is None else fit.row_scale,
        col_scale=None if fit is None else fit.col_scale,
    )


def _of_screen(job: _Job, one: Screened) -> _Exact:
    reading = reading_of(job.matrix, one.profile, one.norm)
    bulk = job.bulk or no_bulk(job.matrix, "its spikes were not counted")
    if job.wants_bulk and one.profile.num_nonfinite:
        bulk = no_bulk(job.matrix, reading.reason or "")
    elif job.wants_bulk and one.whitened_delta is not None and job.fit is not None:
        bulk = bound_reading(job.matrix, job.fit, one.whitened_delta)
    return _Exact(reading, bulk, None, one.relative_delta)


def _settle_counts(
    every: Sequence[WeightMatrix], found: dict[str, _Exact], scope: ChangeScope, processes: Processes
) -> None:
    """Take the spectra without which a family's spike count would stay too open."""
    unsettled = _open_counts({name: one.bulk for name, one in found.items()}, scope)
    matrices = [matrix for matrix in every if matrix.name in unsettled]
    fits = dealt(
        processes, matrices, cost=exact_cost, parts=(values_of,), work=fit_reading, operation="open spike counts"
    )
    for matrix, (bulk, fit) in zip(matrices, fits, strict=True):
        one = found[matrix.name]
        found[matrix.name] = _Exact(one.matrix, bulk, fit, one.relative_delta, one.contract)


def _is_as_in(readings: Readings, matrix: WeightMatrix, tensors: Mapping[str, TensorReading]) -> bool:
    """Whether a matrix is bit for bit, and oriented, as it was when `readings` were taken."""
    then, known = readings.tensors.get(matrix.tensor_name), readings.matrices.get(matrix.name)
    if then is None or known is None or then.digest != tensors[matrix.tensor_name].digest:
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


def untrained_names(matrices: Mapping[str, MatrixReading], bulks: Mapping[str, BulkReading]) -> frozenset[str]:
    """Matrices that carry no learned structure yet: zero, pure bulk, or without a spectrum."""
    return frozenset(
        name for name, reading in matrices.items() if not reading.frobenius_norm or bulks[name].pure_bulk is not False
    )


def looks_untrained(readings: Readings) -> bool:
    """True when spectra were measured and every one of them is a pure Marchenko-Pastur bulk."""
    known = [bulk.pure_bulk for bulk in readings.bulks.values() if bulk.pure_bulk is not None]
    return bool(known) and all(known)


def relative_delta(after: torch.Tensor, before: torch.Tensor | None) -> float | None:
    """||after - before||_F / ||before||_F; None when undefined (nothing to compare with, all zeros, NaN or inf)."""
    found = None if before is None or before.shape != after.shape else relative_change(before, after)
    return found if found is not None and math.isfinite(found) else None
