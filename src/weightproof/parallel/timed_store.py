"""torch.distributed's key-value store, with a limit on every request.

A request to a store whose host is frozen or cut off from the network waits in a system call for as
long as TCP does, deaf to Ctrl-C. So a thread makes the requests, one after the other, and whoever
asks waits for the answer no longer than the limit.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

R = TypeVar("R")

_Answers = queue.SimpleQueue[Exception | None]
_Request = tuple[Callable[[], None], _Answers]


class TimedStore:
    """Requests to a store, each answered within `limit` seconds or given up.

    Args:
        store: the store; its own time limits stay as they are.
        limit: seconds.
    """

    def __init__(self, store: Store, limit: float) -> None:
        self._store = store
        self._limit = limit
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._requests,), name="weightproof-store", daemon=True)
        thread.start()
        weakref.finalize(self, self._requests.put, None)

    def ask(self, request: Callable[[Store], R]) -> R:
        """What `request` returns for the store; several requests in one cost one change of threads.

        Raises:
            RuntimeError: the store failed (a torch.distributed error), or did not answer in time.
        """
        store, results, answers = self._store, list[R](), _Answers()
        self._requests.put((lambda: results.append(request(store)), answers))
        try:
            error = answers.get(timeout=self._limit)
        except queue.Empty:
            raise RuntimeError(f"no answer within {self._limit:g} s") from None
        if error is not None:
            raise error
        return results[0]


def _serve(requests: queue.SimpleQueue[_Request | None]) -> None:
    """Make the requests until None comes. Keeps nothing alive between them."""
    while (item := requests.get()) is not None:
        request, answers = item
        try:
            request()
        except Exception as error:  # noqa: BLE001 - raised again by who asked
            answers.put(error)
        else:
            answers.put(None)
        del item, request, answers
