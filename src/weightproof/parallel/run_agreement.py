"""What is found exactly, by digest, whatever the loss: batches given twice, generators that are not where they were.

A loss says nothing of a process that trains on another one's batches, or of generators that a resume forgot:
training goes on and learns. Equal digests do not happen by chance, so one comparison a check is enough.

`skew_of` says which batches are equal. That alone proves no fault: small data come round again, processes of one
tensor-parallel group share their batches, and a loader that rounds its last batch up begins anew to do so.
`proven_skew` gives what none of that explains: within one pass over data that has every row once, one process was
given a batch again while others went on with new ones.

    >>> ledger = BatchLedger()
    >>> for batch in ledger.over([torch.tensor([1, 2]), torch.tensor([3, 4])]):
    ...     pass
    >>> skew_of([ledger.drain()])
    ()
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weightproof.collective import Processes
from weightproof.parallel.placements import local_of

__all__ = [
    "BatchLedger",
    "Given",
    "Skew",
    "batch_digest",
    "generator_digests",
    "generators_differing",
    "loader_skew",
    "proven_skew",
    "row_digests",
    "shared_batches",
    "skew_of",
]

_Place = tuple[int, int]  # of a batch: rank, and which of its batches

# Fewer rows than this, and two batches may be equal because their data are.
FEWEST_ROWS = 2
# Bytes of one row of one tensor that are read.
LARGEST_ROW = 1 << 16


def batch_digest(batch: Any) -> str:
    """SHA-256 over every tensor of a batch (dtype, shape, bytes), in the order of the batch."""
    whole = hashlib.sha256()
    for key, tensor in _tensors(batch, ""):
        values = local_of(tensor).detach().cpu().contiguous()
        whole.update(f"{key}|{values.dtype}|{tuple(values.shape)}|".encode())
        whole.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _tensors(batch: Any, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(batch, torch.Tensor):
        yield key, batch
    elif isinstance(batch, Mapping):
        for name in batch:
            yield from _tensors(batch[name], f"{key}.{name}")
    elif isinstance(batch, list | tuple):
        for i, part in enumerate(batch):
            yield from _tensors(part, f"{key}.{i}")


class BatchLedger:
    """Digests of the batches that this process was given since the last look."""

    def __init__(self) -> None:
        self._given: list[str] = []

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, noted as they pass."""
        for batch in batches:
            self.add(batch)
            yield batch

    def add(self, batch: Any) -> None:
        """Note a batch."""
        self._given.append(batch_digest(batch))

    def drain(self) -> tuple[str, ...]:
        """Digests since the last call, oldest first; also what a rollback does, after which batches may come again."""
        given, self._given = tuple(self._given), []
        return given


def skew_of(given: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What is wrong with the batches of a window, in words; nothing where all of them differ and counts agree.

    Args:
        given: Digests of the batches of every rank.
    """
    found: list[str] = []
    counts = Counter(len(digests) for digests in given)
    usual = counts.most_common(1)[0][0] if counts else 0
    for rank, digests in enumerate(given):
        if len(digests) != usual:
            found.append(f"rank {rank} was given {len(digests)} batches, the others {usual}")
    first: dict[str, tuple[int, int]] = {}
    for place in range(max(map(len, given), default=0)):
        for rank, digests in enumerate(given):
            if place >= len(digests):
                continue
            seen = first.setdefault(digests[place], (rank, place))
            if seen != (rank, place):
                found.append(
                    f"batch {place + 1} of rank {rank} is batch {seen[1] + 1} of rank {seen[0]} again "
                    f"(sha256 {digests[place][:12]})"
                )
    return tuple(found)


def loader_skew(processes: Processes, ledger: BatchLedger) -> tuple[str, ...]:
    """`skew_of` the batches of all processes since the last look. Every process calls it alike, and gets the same."""
    return skew_of(processes.gather("digests of the batches", ledger.drain()))


# ---- what proves a fault --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """One batch as a process was given it.

    Attributes:
        digest: Of the batch.
        rows: Of each of its rows; empty where it has none that could be told apart.
        pass_over_data: Counted from 0; None where it is not known to belong to a pass that has every row once.
        is_last: Whether it ends its pass, where loaders fill up with rows of the beginning.
    """

    digest: str
    rows: tuple[str, ...] = ()
    pass_over_data: int | None = None
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Skew:
    """What is wrong with the batches of a window, in words.

    Attributes:
        proven: What only a fault explains.
        unproven: What is odd, and may be meant.
    """

    proven: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()


def row_digests(batch: Any) -> tuple[str, tuple[str, ...]]:
    """Digest of a batch (SHA-256), and of every row of it (64 bits of SHA-256).

    Rows are those of the first tensor, and of all others that have as many. Of a row of more than 64 KiB
    evenly spaced elements stand for all, so that batches of pictures or sound cost no time.
    """
    found = [(key, local_of(one).detach()) for key, one in _tensors(batch, "") if one.dim() > 0]
    count = len(found[0][1]) if found else 0
    rows = [hashlib.sha256() for _ in range(count)]
    whole = hashlib.sha256()
    for key, values in found:
        flat = values.reshape(len(values), -1) if values.numel() else values.reshape(len(values), 0)
        flat = flat[:, :: 1 + flat.shape[1] * flat.element_size() // LARGEST_ROW].cpu().contiguous()
        head = f"{key}|{values.dtype}|{tuple(values.shape[1:])}|".encode()
        for row, part in zip(rows if len(values) == count else [whole] * len(values), flat, strict=True):
            row.update(head)
            row.update(part.view(torch.uint8).numpy().tobytes())
    for row in rows:
        whole.update(row.digest())
    return whole.hexdigest(), tuple(row.hexdigest()[:16] for row in rows)


def shared_batches(given: Sequence[Sequence[Given]]) -> tuple[tuple[int, ...], ...]:
    """Ranks that are given the same batches, all along: one group for each stream of batches."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, batches in enumerate(given):
        groups.setdefault(tuple(one.digest for one in batches), []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values())


def proven_skew(given: Sequence[Sequence[Given]], groups: Sequence[Sequence[int]], before: int = 0) -> Skew:
    """What is wrong with the batches of a stretch of training: pure, the same on every rank.

    Proven is a batch that came before (of this rank or another one) in the same pass over data that has every row
    once, where another rank went on with new batches, there and at the next place; so data that begin anew on all ranks
    are let be, and the last place of the stretch is judged with the next one. Rows that occur in
    batches that differ, or twice in one, mean that the data repeat themselves: nothing is proven then, nor by
    batches of a single row.

    Args:
        given: Batches of every rank, in order.
        groups: As `shared_batches` gave them at the beginning of the run; one rank speaks for each.
        before: Batches of a rank before this stretch, from which those that are named are counted on.
    """
    voices = [group[0] for group in groups]
    if len({len(given[rank]) for rank in voices}) > 1:
        counts = ", ".join(f"{len(given[rank])} on rank {rank}" for rank in voices)
        return Skew(unproven=(f"the ranks were given different numbers of batches: {counts}",))
    again = _repeats(given, voices)
    found = [
        f"batch {before + place + 1} of rank {rank} is batch {before + then + 1} of rank {other} again "
        f"(sha256 {given[rank][place].digest[:12]})"
        for (rank, place), (other, then) in again.items()
        if any(_is_new(given, again, one, place) and _is_new(given, again, one, place + 1) for one in voices)
    ]
    if not found:
        return Skew()
    return Skew(proven=tuple(found)) if _has_every_row_once(given, voices) else Skew(unproven=tuple(found))


def _repeats(given: Sequence[Sequence[Given]], voices: Sequence[int]) -> dict[_Place, _Place]:
    """(rank, place) of every batch that came before, with those of then; at one place the lower rank is first."""
    found: dict[_Place, _Place] = {}
    first: dict[tuple[int | None, str], _Place] = {}
    for place in range(max((len(given[rank]) for rank in voices), default=0)):
        for rank in voices:
            batch = given[rank][place]
            if not _is_comparable(batch):
                continue
            seen = first.setdefault((batch.pass_over_data, batch.digest), (rank, place))
            if seen != (rank, place):
                found[rank, place] = seen
    return found


def _is_new(given: Sequence[Sequence[Given]], again: Mapping[_Place, _Place], rank: int, place: int) -> bool:
    """Whether a rank's batch at a place is known to be one that nobody had before."""
    return place < len(given[rank]) and _is_comparable(given[rank][place]) and (rank, place) not in again


def _is_comparable(batch: Given) -> bool:
    return batch.pass_over_data is not None and not batch.is_last


def _has_every_row_once(given: Sequence[Sequence[Given]], voices: Sequence[int]) -> bool:
    """Whether no row is in two batches that differ, nor twice in one; batches of one row cannot tell."""
    home: dict[tuple[int | None, str], str] = {}
    for batch in (batch for rank in voices for batch in given[rank] if _is_comparable(batch)):
        if len(batch.rows) < FEWEST_ROWS or len(set(batch.rows)) < len(batch.rows):
            return False
        if any(home.setdefault((batch.pass_over_data, row), batch.digest) != batch.digest for row in batch.rows):
            return False
    return True


# ---- generators -----------------------------------------------------------------------------------------------------


def generator_digests() -> dict[str, str]:
    """SHA-256 of the state of every global generator of this process; CUDA's only where it is in use.

    As JSON they go into a checkpoint, and `generators_differing` holds them against what a resume restored.
    """
    version, internal, held = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is what training uses
    states = {
        "Python": repr((version, internal, held)).encode(),
        "numpy": numpy_state["state"]["key"].tobytes()
        + repr((numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"])).encode(),
        "torch CPU": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"CUDA {i}"] = state.cpu().numpy().tobytes()
    return {name: hashlib.sha256(state).hexdigest() for name, state in states.items()}


def generators_differing(kept: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the generators that are not where they were when `kept` was read, or are missing on one side."""
    now = generator_digests()
    return tuple(sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name)))
