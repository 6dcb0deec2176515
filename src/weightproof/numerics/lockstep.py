"""Screens of matrices that lie in parts on many processes: nothing but vectors travels.

All matrices go through the ladder of `weightproof.numerics.norms` together. In each round every process
computes its part of the next step of every matrix that is not decided yet, and one sum over the
processes takes them all. What is decided, and so which matrices take part in the next round,
follows from sums alone, or from numbers that every process takes from the first: all stay in step.

A matrix that the ladder cannot decide has no norm here; its owner takes the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from weightproof.collective import Processes
from weightproof.numerics.lanczos import FAILURE_PROBABILITY, Bidiagonal
from weightproof.numerics.matrices import full_precision
from weightproof.numerics.matrix_parts import SUMS, Facts, MatrixPart, cut_dim
from weightproof.numerics.norms import (
    DELTA_STEPS,
    LIMIT_STEPS,
    SCREEN_TOLERANCE,
    Limit,
    NormEstimate,
    NormReference,
    around,
    checked_limit,
)
from weightproof.numerics.sharded_lanczos import ShardedGolubKahan
from weightproof.parallel.shards import Shard
from weightproof.spectrum import Profile

# Steps after which a screen without limits looks at its bracket. (One process looks after each:
# here a look is a sum of its own.)
SCREEN_LOOKS = (6, 9, 12, 16, 20, 24)

R = TypeVar("R")

# Yields what is to be summed over the processes, and gets the sum.
Climb = Generator[torch.Tensor, torch.Tensor, R]


@dataclass(frozen=True, slots=True, eq=False)
class ScreenRequest:
    """One matrix to be screened, and what is known of it.

    Args:
        name: Salt of the start vectors; used in errors.
        now: This process's part of the matrix, cut by rows or columns.
        before: The same part of a state before; None when there is none.
        reference: ||before||_2 with its error; without it or `before` the norm is estimated afresh.
        limit: (low, high) in absolute units, as of `track_norm`; None for a screen to 5 %.
        row_scale: (d_out,), whole, or None for ones; with `before`, asks for `whitened_delta`.
        col_scale: (d_in,), whole, or None for ones; likewise.
    """

    name: str
    now: Shard
    before: Shard | None = None
    reference: NormReference | None = None
    limit: tuple[float, float] | None = None
    row_scale: torch.Tensor | None = None
    col_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Screened:
    """What a screen found of one matrix: the same, bit for bit, on every process.

    Args:
        profile: As `weightproof.spectrum.profile` of the whole matrix.
        norm: None when only the exact norm can tell: the limit stayed open, values are not finite
            or out of float32's range, or the matrix is exactly of low rank.
        relative_delta: ||W - W_before||_F / ||W_before||_F; None without a state before, or where it
            is zero or either is not finite.
        whitened_delta: Upper bound on ||diag(r) (W - W_before) diag(c)||_2 that fails with
            probability <= 1e-6; None unless it was asked for and both states are finite.
    """

    profile: Profile
    norm: NormEstimate | None
    relative_delta: float | None
    whitened_delta: float | None


@full_precision
@torch.no_grad()
def screen(processes: Processes, requests: Sequence[ScreenRequest]) -> list[Screened]:
    """Profiles and norms of sharded matrices, all in lockstep.

    One sum over the processes takes the energies of all matrices and of their changes; then come
    at most 4 + 1 sums for the changes and 40 + 5 for the norms, however many matrices there are.

    Memory beside the parts: in float32 the vectors of the matrices that are undecided at a time
    (see `ShardedGolubKahan`), twice what is summed in a round, and chunks of 1 MiB.

    Args:
        processes: Those that hold the parts. Every one calls with the same requests in the same order.
        requests: The matrices.

    Raises:
        InputError: shards cut in another way than rows or columns, states that do not lie alike,
            scales of the wrong length, or limits in the wrong order.
        CollectiveError: another process failed or does not answer.
    """
    limits = [None if request.limit is None else checked_limit(request.limit) for request in requests]
    parts = [_part(request, processes) for request in requests]
    if not parts:
        return []
    sums = processes.sum(f"screen: energies of {len(parts)} matrices", [part.readings() for part in parts])
    facts = [part.facts(total) for part, total in zip(parts, sums, strict=True)]
    climbs: list[Climb[NormEstimate | float | None]] = []
    for request, part, known, limit in zip(requests, parts, facts, limits, strict=True):
        climbs += [_norm(request, part, known, limit), _whitened_bound(request, part, known)]
    found = _in_lockstep(processes, climbs)
    norms, bounds = cast("list[NormEstimate | None]", found[::2]), cast("list[float | None]", found[1::2])
    return [
        Screened(known.profile, norm, known.relative_change, bound)
        for known, norm, bound in zip(facts, norms, bounds, strict=True)
    ]


def _part(request: ScreenRequest, processes: Processes) -> MatrixPart:
    scales = (request.row_scale, request.col_scale)
    return MatrixPart(request.name, request.now, request.before, scales, processes)


def predicted_bytes(
    request: ScreenRequest, size: int, *, delta: bool = False, whitened: bool = False, norm_steps: int = 0
) -> float:
    """Bytes that each of `size` processes sends for one matrix of a screen, by the formula.

    Beside the energies, 8 (m + n + size + 4) bytes, K steps send 4 (K (n + 1) + K (K - 1) / 2) bytes,
    where n is the side that is not cut, and each look at the bracket after k steps 8 k more. A ring
    all-reduce sends 2 (size - 1) / size times what is summed.

    Args:
        request: The matrix.
        size: How many processes hold parts of it.
        delta: Whether the norm of the change was bounded by Lanczos steps.
        whitened: Whether the norm of the whitened change was.
        norm_steps: Steps taken on the matrix itself; 0 when the change decided.
    """
    free = request.now.shape[1 - cut_dim(request.now, request.name)]
    numbers = (delta + whitened) * _lanczos_numbers(free, [DELTA_STEPS])
    if norm_steps:
        schedule = SCREEN_LOOKS if request.limit is None else LIMIT_STEPS
        numbers += _lanczos_numbers(free, [steps for steps in schedule if steps <= norm_steps])
    return 2.0 * (size - 1) / size * (8 * (sum(request.now.shape) + size + len(SUMS)) + 4 * numbers)


def _lanczos_numbers(free: int, looks: Sequence[int]) -> int:
    steps = looks[-1]
    return steps * (free + 1) + steps * (steps - 1) // 2 + 2 * sum(looks)


def _in_lockstep(processes: Processes, climbs: Sequence[Climb[R]]) -> list[R]:
    """Run all climbs to their end, with one sum over the processes for all of them in each round."""
    results: dict[int, R] = {}
    waiting: dict[int, torch.Tensor] = {}

    def go_on(index: int, total: torch.Tensor | None) -> None:
        try:
            waiting[index] = next(climbs[index]) if total is None else climbs[index].send(total)
        except StopIteration as end:
            waiting.pop(index, None)
            results[index] = end.value

    for index in range(len(climbs)):
        go_on(index, None)
    rounds = 0
    while waiting:
        rounds += 1
        numbers = sum(tensor.numel() for tensor in waiting.values())
        # Processes that were out of step would be told apart by this name.
        operation = f"screen: round {rounds}, {len(waiting)} vectors of {numbers} numbers in all"
        totals = processes.sum(operation, list(waiting.values()))
        for index, total in zip(list(waiting), totals, strict=True):
            go_on(index, total)
    return [results[index] for index in range(len(climbs))]


def _look(process: ShardedGolubKahan, steps: int) -> Climb[Bidiagonal]:
    """Take steps until `steps` have been taken; the coefficients that all processes go by."""
    process.reserve(steps)
    while process.steps < steps:
        process.receive((yield process.send()))
    return process.coefficients((yield process.found()))


def _norm(request: ScreenRequest, part: MatrixPart, known: Facts, limit: Limit | None) -> Climb[NormEstimate | None]:
    """The ladder of `track_norm` or of `estimate_norm`, up to what needs the matrix in one place."""
    if known.profile.num_nonfinite:
        return None
    if known.profile.frobenius_norm == 0.0:
        return NormEstimate(0.0, 0.0, "sharded zero matrix", 1)
    if limit is None:
        return (yield from _screen(request, part))
    if request.reference is None or request.before is None:
        return (yield from _narrowed(request, part, limit, (0.0, math.inf)))
    return (yield from _tracked(request, part, known.change, limit))


def _screen(request: ScreenRequest, part: MatrixPart) -> Climb[NormEstimate | None]:
    """As `estimate_norm` without limits."""
    process = ShardedGolubKahan(part.matrix(), key=request.name, leads=part.leads)
    found = Bidiagonal(0)
    for steps in SCREEN_LOOKS:
        found = yield from _look(process, steps)
        if not found.finite or found.vanished:
            return None
        if found.settled(SCREEN_TOLERANCE):
            break
        if found.exhausted:
            return None
    lower, ritz, upper = found.bounds()
    return NormEstimate(ritz, max(upper - ritz, ritz - lower), _method(process.steps), process.reads)


def _tracked(
    request: ScreenRequest, part: MatrixPart, frobenius: float | None, limit: Limit
) -> Climb[NormEstimate | None]:
    """R1, R2 and R3: from the norm before and the norm of the change, then from the matrix itself."""
    reference = request.reference
    assert reference is not None
    if frobenius is None:
        return None
    decided = around(reference, frobenius, limit)
    if decided is not None:
        return NormEstimate(*decided, "sharded delta-frobenius", 2)
    process = ShardedGolubKahan(part.change(), key=("delta", request.name), leads=part.leads)
    operator = min(frobenius, (yield from _delta_bound(process)))
    decided = around(reference, operator, limit)
    reads = 2 + process.reads
    if decided is not None:
        return NormEstimate(*decided, _method(process.steps, "delta-"), reads)
    # Frees the vectors before those of the matrix are made.
    del process
    change = reference.error + operator
    return (yield from _narrowed(request, part, limit, (reference.value - change, reference.value + change), reads))


def _narrowed(
    request: ScreenRequest, part: MatrixPart, limit: Limit, bracket: tuple[float, float], reads: int = 0
) -> Climb[NormEstimate | None]:
    """R3: narrow `bracket`, which already holds the norm, until `limit` is decided; None when it is not."""
    process = ShardedGolubKahan(part.matrix(), key=request.name, leads=part.leads)
    for steps in LIMIT_STEPS:
        if 2 * steps > max(min(part.shape), 2 * LIMIT_STEPS[0]):
            break
        found = yield from _look(process, steps)
        if not found.finite or found.vanished:
            break
        lower, _, upper = found.bounds()
        lower, upper = max(lower, bracket[0]), min(upper, bracket[1])
        if lower > upper:
            # Two bounds contradict each other: one of them failed.
            break
        if limit.settles(lower, upper):
            return NormEstimate((lower + upper) / 2, (upper - lower) / 2, _method(steps), reads + process.reads)
        if found.exhausted:
            break
    return None


def _whitened_bound(request: ScreenRequest, part: MatrixPart, known: Facts) -> Climb[float | None]:
    """As `delta_norm_bound`."""
    if known.profile.num_nonfinite or known.whitened_change is None:
        return None
    if known.change == 0.0:
        return 0.0
    process = ShardedGolubKahan(part.whitened_change(), key=("delta", request.name), leads=part.leads)
    return min(known.whitened_change, (yield from _delta_bound(process)))


def _delta_bound(process: ShardedGolubKahan) -> Climb[float]:
    found = yield from _look(process, DELTA_STEPS)
    return found.bounds()[2] if found.finite and not found.vanished else math.inf


def _method(steps: int, what: str = "") -> str:
    return f"sharded {what}lanczos-{steps}, upper bound fails with p <= {FAILURE_PROBABILITY:g}"
