"""Ranks that are threads of one process: enough of `weightproof.collective.Processes` for code that meets and gathers.

Dozens of runs of two ranks a second, in which one of them may die at a chosen call. Real processes: `worlds.run_world`.
"""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from weightproof.errors import CollectiveError, WeightproofError


class _Board:
    """Where the ranks meet: what each of them brought to each meeting."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.meetings: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        self.gone = False
        self.changed = threading.Condition()

    def meet(self, number: int, rank: int, value: Any) -> list[Any] | None:
        """What all of them brought; None if one is gone and did not come."""
        meeting = self.meetings[number]
        with self.changed:
            meeting[rank] = value
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(meeting) == self.size or self.gone, timeout=60)
            return [copy.deepcopy(meeting[each]) for each in range(self.size)] if len(meeting) == self.size else None

    def leave(self) -> None:
        """A rank ended with an error: nobody may wait for it."""
        with self.changed:
            self.gone = True
            self.changed.notify_all()


class ThreadRank:
    """One rank."""

    def __init__(self, rank: int, board: _Board) -> None:
        self.rank, self.size = rank, board.size
        self.operations: list[str] = []
        self._board = board

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def _meet(self, operation: str, value: Any) -> list[Any]:
        self.operations.append(operation)
        found = self._board.meet(len(self.operations), self.rank, (operation, value))
        if found is None:
            raise CollectiveError(f"{operation}: a rank is gone", operation=operation)
        assert {name for name, _ in found} == {operation}, "the ranks are at different operations"
        return [value for _, value in found]

    def gather(self, operation: str, value: Any) -> list[Any]:
        return self._meet(operation, value)

    def broadcast(self, operation: str, value: Any) -> Any:
        return self._meet(operation, value)[0]

    @contextmanager
    def together(self, operation: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._meet(operation, error)
            raise
        errors = [error for error in self._meet(operation, None) if error is not None]
        if errors:
            known = isinstance(errors[0], WeightproofError)
            raise errors[0] if known else CollectiveError(str(errors[0]), operation=operation)


def run_ranks(size: int, body: Callable[[Any], Any]) -> list[Any]:
    """`body(processes)` on every rank: by rank what it gave, or the error that ended it."""
    board = _Board(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadRank(rank, board))
        except BaseException as error:  # noqa: BLE001 - given to the caller
            results[rank] = error
            board.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
