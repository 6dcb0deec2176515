"""Processes that are threads of one: what the sharded screen computes, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from weightproof.parallel.shards import Shard

T = TypeVar("T")


class SimulatedProcesses:
    """The part of `weightproof.collective.Processes` that the screen uses, as one rank sees it."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = 0
        self.operations: list[str] = []
        self._board, self._barrier = board, barrier

    def sum(self, operation: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._board[self.rank] = (operation, [tensor.clone() for tensor in tensors])
        self._barrier.wait()
        assert {name for name, _ in self._board} == {operation}
        totals = [torch.stack(parts).sum(0) for parts in zip(*(parts for _, parts in self._board), strict=True)]
        self.bytes_sent += sum(2 * (self.size - 1) * tensor.nbytes // self.size for tensor in tensors)
        self.operations.append(operation)
        self._barrier.wait()
        return totals


def simulate(size: int, body: Callable[[Any], T]) -> tuple[list[T], list[SimulatedProcesses]]:
    """Run `body(processes)` on every rank; results and processes by rank. The first failure is raised."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    ranks = [SimulatedProcesses(rank, size, board, barrier) for rank in range(size)]
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(ranks[rank])
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(size)], ranks


def cut(matrix: torch.Tensor, size: int, rank: int, layout: str = "rows", turned: bool = False) -> Shard:
    """The part of a (d_out, d_in) matrix that `rank` holds: as `torch.chunk` cuts what is stored."""
    stored = matrix.t().contiguous() if turned else matrix
    dim = 0 if layout == "rows" else 1
    side = stored.shape[dim]
    step = -(-side // size)
    ranges = tuple((min(part * step, side), min((part + 1) * step, side)) for part in range(size))
    start, end = ranges[rank]
    local = stored.narrow(dim, start, end - start).contiguous()
    return Shard(tuple(stored.shape), stored.dtype, layout, ranges, local, turned, rank)
