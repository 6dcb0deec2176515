"""The outputs of a model on windows, batch by batch, each batch read by one process.

Batch i of all windows belongs to process i mod P. Results are exchanged and put in the order of the
batches, so that sums over them have the same bits on every process and for every number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import nn

from weightproof.activations import TapMoments, TapSums, forward_outputs, tap_moments, undisturbed
from weightproof.collective import Processes
from weightproof.errors import BaselineError, InputError, WeightproofError
from weightproof.families import unwrap
from weightproof.forward.passes import CONNECTION_ERRORS, share_inputs, skip_pass
from weightproof.forward.windows import Windows

R = TypeVar("R")

# What a pass may find wrong with the model or its inputs: all processes raise it. Anything else (no memory) ends
# the body of `Processes.together` around it.
_FOUND = (InputError, BaselineError)


@dataclass(frozen=True, slots=True)
class Place:
    """Batch number `batch` of windows number `windows`."""

    windows: int
    batch: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Scores (n, width) of the real tokens of one batch, and the row of the batch (n,) of each token."""

    kind: str
    scores: torch.Tensor
    window: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchRead(Generic[R]):
    """What the owner of a batch read from its outputs, and the tap sums of its pass."""

    place: Place
    value: R
    taps: TapSums


@dataclass(slots=True)
class _Share(Generic[R]):
    """What one process found: its own batches, batches it ran beside their owners, failures by batch."""

    own: dict[int, BatchRead[R]] = field(default_factory=dict)
    spare: list[BatchRead[R]] = field(default_factory=list)
    failures: dict[int, tuple[type[WeightproofError], str]] = field(default_factory=dict)


def read_batches(  # noqa: PLR0913 - keyword-only options
    model: nn.Module,
    windows: Sequence[Windows],
    processes: Processes,
    read: Callable[[Place, tuple[Part, ...], bool], R],
    *,
    operation: str,
    with_taps: bool = True,
    turn: int | None = None,
) -> tuple[list[BatchRead[R]], list[BatchRead[R]]]:
    """One forward pass for each batch by its owner; what was read of all batches, on every process.

    All processes make the same number of passes: one that has no batch left runs another's again, and
    where the model is computed by all processes between them, all run every batch.

    Args:
        model: The model.
        windows: What it is run on.
        processes: Those among which the batches are dealt.
        read: Called with a batch's place, its outputs, and whether they are this process's own. The
            result is sent to all processes: keep it small.
        operation: What the passes are for, in errors.
        with_taps: Whether block outputs are summed up on the way; else the tap sums are empty.
        turn: Read one batch only, the same for any number of processes; after as many turns the first again.

    Returns:
        The results of all batches that were read, in their order; and those of batches that were not the process's own.

    Raises:
        InputError: If a pass failed on any process (the first batch that did, the same on all).
        BaselineError: If `read` raised it on any process.
        CollectiveError: If anything else was raised on another process.
    """
    places = [Place(index, batch) for index, one in enumerate(windows) for batch in range(len(one.batches))]
    chosen = range(len(places))
    if turn is not None:
        first = turn % len(places)
        chosen = range(first, first + 1)
    with processes.together(operation):
        share, raised = _read_share(model, windows, processes, places, chosen, read, with_taps)
        shares = processes.gather(operation, share)
    _raise_first(shares, raised)
    own = [shares[index % processes.size].own[index] for index in chosen]
    return own, [one for share in shares for one in share.spare]


def _read_share(  # noqa: PLR0913, PLR0917 - what `read_batches` was given
    model: nn.Module,
    windows: Sequence[Windows],
    processes: Processes,
    places: Sequence[Place],
    chosen: range,
    read: Callable[[Place, tuple[Part, ...], bool], R],
    with_taps: bool,
) -> tuple[_Share[R], dict[int, WeightproofError]]:
    share: _Share[R] = _Share()
    raised: dict[int, WeightproofError] = {}
    tapped = tap_moments(model) if with_taps else contextlib.nullcontext(TapMoments(()))
    with undisturbed(model), tapped as taps:
        turns = list(_turns(chosen, processes, alike=share_inputs(unwrap(model), processes.size)))
        for turn, (index, is_own) in enumerate(turns):
            place = places[index]
            try:
                parts = _outputs(model, windows[place.windows].batches[place.batch], taps)
                found = BatchRead(place, read(place, parts, is_own), taps.take())
            except _FOUND as error:
                share.failures[index] = (type(error), str(error))
                raised[index] = error
                taps.take()
                continue
            except CONNECTION_ERRORS:
                raise
            except BaseException:
                for _ in turns[turn + 1 :]:
                    skip_pass(unwrap(model))
                raise
            if is_own:
                share.own[index] = found
            else:
                share.spare.append(found)
    return share, raised


def _turns(chosen: range, processes: Processes, *, alike: bool) -> Iterator[tuple[int, bool]]:
    """The batches that this process runs, and whether each is its own; as many on every process.

    Args:
        chosen: The batches; each belongs to the rank that its number gives modulo the number of processes.
        processes: Those among which they are dealt.
        alike: Whether all processes run every batch.
    """
    if alike:
        yield from ((index, index % processes.size == processes.rank) for index in chosen)
        return
    own = [index for index in chosen if index % processes.size == processes.rank]
    most = max(sum(index % processes.size == rank for index in chosen) for rank in range(processes.size))
    yield from ((index, True) for index in own)
    yield from ((chosen[(len(own) + i) % len(chosen)], False) for i in range(most - len(own)))


def _raise_first(shares: Sequence[_Share[R]], raised: Mapping[int, WeightproofError]) -> None:
    """Raise the failure of the first batch that has one, the same on every process."""
    failed = {rank: min(share.failures) for rank, share in enumerate(shares) if share.failures}
    if not failed:
        return
    rank = min(failed, key=lambda rank: (failed[rank], rank))
    index = failed[rank]
    kind, message = shares[rank].failures[index]
    # Where all fail alike it is the model's fault, and one process would say the same.
    raise kind(message if len(failed) == len(shares) else f"rank {rank}: {message}") from raised.get(index)


def _outputs(model: nn.Module, batch: Mapping[str, torch.Tensor], taps: TapMoments) -> tuple[Part, ...]:
    """One forward pass: the scores and, where there is one, the pooled summary."""
    taps.batch = batch
    output = forward_outputs(model, batch)
    main = _flat(output.kind, output.scores, output.real)
    return (main,) if output.pooled is None else (main, _flat(output.kind, output.pooled, None))


def _flat(kind: str, scores: torch.Tensor, real: torch.Tensor | None) -> Part:
    scores = scores if scores.ndim > 1 else scores[None]
    rows = torch.arange(scores.shape[0]).reshape(-1, *[1] * (scores.ndim - 2)).expand(scores.shape[:-1])
    if real is None:
        return Part(kind, scores.reshape(-1, scores.shape[-1]), rows.flatten())
    return Part(kind, scores[real.to(scores.device)], rows[real])
