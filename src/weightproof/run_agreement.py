"""What is found exactly, by digest, whatever the loss: batches given twice, generators that are not where they were.

A loss says nothing of a process that trains on another one's batches, or of generators that a resume forgot:
training goes on and learns. Equal digests do not happen by chance, so one comparison a check is enough.

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
from typing import Any

import numpy as np
import torch

from weightproof.collective import Processes
from weightproof.placements import local_of

__all__ = ["BatchLedger", "batch_digest", "generator_digests", "generators_differing", "loader_skew", "skew_of"]


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
