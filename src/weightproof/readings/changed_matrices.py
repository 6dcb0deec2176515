"""What is read of single matrices after a change, by the cheapest route that settles the question.

Spectral norms by the delta ladder, spike counts by Weyl's inequality, exact spectra only where those leave the answer
open. Of a sharded model, a change that promises nothing of single elements is screened where the shards lie
(`lockstep`); else the parts of a matrix travel to its owner, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weightproof.collective import Processes
from weightproof.contracts.quantities import relative_change
from weightproof.kinds import Kind, Plain, expected_names
from weightproof.numerics.lockstep import Screened, ScreenRequest, screen
from weightproof.parallel.shards import Part, Shard, dealt
from weightproof.probes import Findings, exact_cost, read_whole, screen_cost, values_of
from weightproof.readings.matrices import (
    bound_reading,
    no_bulk,
    norm_reference,
    read_bulk,
    read_tracked,
    reading_of,
    refused,
)
from weightproof.snapshot import tensor_digest
from weightproof.types import BulkFit, BulkReading, ContractReading, MatrixReading, WeightMatrix


class Originals(Protocol):
    """Whoever keeps the matrices as they were before a change: a snapshot, or the folder of a base model."""

    def original_matrix(self, matrix: WeightMatrix) -> torch.Tensor | None:
        """The matrix of this name before the change, (d_out, d_in); None where there was none."""
        ...

    def original_shard(self, matrix: WeightMatrix) -> torch.Tensor | Shard | None:
        """The same, or the part of it that lay here."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """One matrix to look at after a change, and what is known of it.

    `stale`: its readings are not those of now. `tracked`: the snapshot holds the values that `known`
    and `fit` were read from. `wants_bulk`: its spike count is refreshed. `planned`: digest of what an edit of
    ours meant to write.
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
    planned: str | None


def read_jobs(jobs: Sequence[Job], originals: Originals, kind: Kind, processes: Processes) -> dict[str, Findings]:
    """Readings of every job: screened on the shards where that is enough, by owners where it is not."""
    screened = [job for job in jobs if _can_be_screened(job, kind)]
    found = _screened(screened, originals, processes)
    owned = [job for job in jobs if not _can_be_screened(job, kind)]

    def before(job: Job) -> Part:
        if not job.touched:
            return None
        if job.matrix.shard is not None:
            return originals.original_shard(job.matrix)
        return lambda: originals.original_matrix(job.matrix)  # on the owner alone: it may lie on disk

    def work(job: Job, weight: torch.Tensor, original: torch.Tensor | None) -> Findings:
        return _read_owned(job, weight, original, kind)

    parts = (lambda job: values_of(job.matrix), before)
    read = dealt(
        processes, owned, cost=lambda job: screen_cost(job.matrix), parts=parts, work=work, operation="changed matrices"
    )
    return found | {job.matrix.name: one for job, one in zip(owned, read, strict=True)}


def _read_owned(job: Job, weight: torch.Tensor, original: torch.Tensor | None, kind: Kind) -> Findings:
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
    then = original if job.touched else weight if name in expected_names(kind) else None
    if then is not None and then.shape == weight.shape:
        contract += kind.measure(name, then, weight)
    if job.planned is not None:
        contract.append(differs_from_plan(name, differs=tensor_digest(weight) != job.planned))
    delta = relative_delta(weight, original) if job.touched else None
    return Findings(reading, bulk, fit, delta, tuple(contract))


def differs_from_plan(name: str, *, differs: bool) -> ContractReading:
    """Whether our own edit wrote something else than it planned."""
    return ContractReading(name, "differs_from_plan", float(differs), 0.0, rigorous=True)


def _can_be_screened(job: Job, kind: Kind) -> bool:
    """Whether vectors that travel instead of the matrix settle what is asked of it."""
    shard = job.matrix.shard
    if shard is None or shard.layout == "flat" or job.limit is None or not job.stale or not job.tracked:
        return False
    spikes_are_bounded = not job.wants_bulk or (job.fit is not None and job.fit.row_scale is not None)
    return spikes_are_bounded and isinstance(kind, Plain) and job.planned is None


def _screened(jobs: Sequence[Job], originals: Originals, processes: Processes) -> dict[str, Findings]:
    """Readings from the shards where they lie; what the screen cannot decide is read exactly by owners."""
    if not jobs:
        return {}
    seen = screen(processes, [_request(job, originals) for job in jobs])
    found = {job.matrix.name: _of_screen(job, one) for job, one in zip(jobs, seen, strict=True)}
    opened = [job for job, one in zip(jobs, seen, strict=True) if one.norm is None and not one.profile.num_nonfinite]
    unfitted = [job for job, one in zip(jobs, seen, strict=True) if _lacks_bound(job, one)]
    matrices = [job.matrix for job in jobs if job in opened or job in unfitted]
    exact = dealt(processes, matrices, cost=exact_cost, parts=(values_of,), work=read_whole, operation="open matrices")
    for matrix, one in zip(matrices, exact, strict=True):
        screened = found[matrix.name]
        refit = any(job.matrix is matrix for job in unfitted)
        found[matrix.name] = Findings(
            one.matrix, one.bulk if refit else screened.bulk, one.fit if refit else None, screened.relative_delta
        )
    return found


def _lacks_bound(job: Job, one: Screened) -> bool:
    return job.wants_bulk and one.whitened_delta is None and not one.profile.num_nonfinite


def _request(job: Job, originals: Originals) -> ScreenRequest:
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


def _of_screen(job: Job, one: Screened) -> Findings:
    reading = reading_of(job.matrix, one.profile, one.norm)
    bulk = job.bulk or no_bulk(job.matrix, "its spikes were not counted")
    if job.wants_bulk and one.profile.num_nonfinite:
        bulk = no_bulk(job.matrix, reading.reason or "")
    elif job.wants_bulk and one.whitened_delta is not None and job.fit is not None:
        bulk = bound_reading(job.matrix, job.fit, one.whitened_delta)
    return Findings(reading, bulk, None, one.relative_delta)


def relative_delta(after: torch.Tensor, before: torch.Tensor | None) -> float | None:
    """||after - before||_F / ||before||_F; None when undefined (nothing to compare with, all zeros, NaN or inf)."""
    found = None if before is None or before.shape != after.shape else relative_change(before, after)
    return found if found is not None and math.isfinite(found) else None
