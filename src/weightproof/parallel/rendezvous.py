"""How the ranks of a run agree that all of them are at the same operation before any payload moves.

A collective that one rank never enters hangs the others, and a rank that leaves a sequence of
collectives early lets the others receive the wrong payload. So every operation has a number, and the
ranks first meet in torch.distributed's key-value store. Keys, under a prefix of our own:

    at/<rank>         [number, operation, note, done]: where this rank was last seen
    <number>/count    how many ranks have come
    <number>/outcome  written exactly once, by compare_set: "ok" with the notes of all ranks (by the
                      last rank to come), or a failure (by a rank that failed, or that waited too long)

The outcome in the store is the only truth: who writes one reads what the store then holds. A rank
whose own work failed writes the failure as the outcome of its next number; the others find it at
whatever operation they come to next, under the same number, so that all stay in step.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from weightproof import errors
from weightproof.errors import CollectiveError, WeightproofError
from weightproof.parallel.timed_store import TimedStore

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Polls cost the host of the store about 60 us each: often at first, then about twenty a second.
POLL_SHARE = 0.1
LONGEST_POLL_SECONDS = 0.05

# After a broken payload: how long to wait for signs of life before the silent ranks are named. Where it broke because
# the limit was over, those who waited too notice at once, and who wakes up later is the one to name.
SIGNS_OF_LIFE_SECONDS = 5.0
SIGNS_OF_LIFE_AT_THE_LIMIT_SECONDS = 0.3

LONGEST_MESSAGE = 2000

_TOLD = "_weightproof_told"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an operation failed, as every rank reads it; `lost`: the ranks can do nothing together any more."""

    operation: str
    ranks: tuple[int, ...]
    message: str
    kind: str = CollectiveError.__name__
    timed_out: bool = False
    lost: bool = False

    @classmethod
    def of(cls, operation: str, rank: int, error: BaseException, *, lost: bool = False) -> Failure:
        """What the other ranks are told of an error of this rank."""
        text = str(error)[:LONGEST_MESSAGE]
        if isinstance(error, WeightproofError):
            kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
            return cls(operation, (rank,), f"rank {rank}: {text}", kind, lost=lost)
        return cls(operation, (rank,), f"rank {rank} failed in {operation}: {type(error).__name__}: {text}", lost=lost)

    def error(self) -> WeightproofError:
        """A fresh exception: of the class that the rank at fault raised if it is one of weightproof's."""
        kind = getattr(errors, self.kind)
        if not issubclass(kind, CollectiveError):
            return kind(self.message)
        return kind(self.message, operation=self.operation, ranks=self.ranks, timed_out=self.timed_out)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank was last seen; `done`: it has its payload of that number and went on."""

    number: int
    operation: str
    note: str = ""
    done: bool = False

    def passed(self, number: int) -> bool:
        """Whether the rank is through the operation before `number`."""
        return self.number >= number or (self.number == number - 1 and self.done)


_Outcome = Failure | list[str]


def _encoded(outcome: _Outcome) -> str:
    return json.dumps(asdict(outcome) if isinstance(outcome, Failure) else outcome)


def _decoded(text: bytes) -> _Outcome:
    held = json.loads(text)
    return held if isinstance(held, list) else Failure(**{**held, "ranks": tuple(held["ranks"])})


def named(ranks: tuple[int, ...]) -> str:
    """For error messages: "rank 1", or "ranks 1, 2"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


class Rendezvous:
    """The meetings of one rank with all others. Not for use by several threads of a process.

    Args:
        store: a key-value store of torch.distributed that all ranks share, with a prefix of its own.
        rank: this process.
        size: how many processes meet.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.lost: Failure | None = None
        self._store = TimedStore(store, timeout)
        self._number = 0
        self._old_keys: list[str] = []

    def meet(self, operation: str, note: str = "") -> list[str]:
        """Come to `operation`; return when all ranks have come, with every rank's note, by rank.

        Raises:
            CollectiveError: another rank failed, is missing, or came to another operation.
            WeightproofError: the class that another rank raised.
        """
        self.raise_if_lost()
        try:
            with self._store_answers(operation):
                outcome = self._come(operation, note)
        except BaseException as error:
            self.tell(operation, error)
            raise
        if isinstance(outcome, Failure):
            raise self.shared(outcome)
        return outcome

    def finished(self, operation: str) -> None:
        """Leave word that this rank has its payload of the last meeting."""
        with self._store_answers(operation):
            self._store.ask(self._word(_Place(self._number - 1, operation, done=True)))

    def tell(self, operation: str, error: BaseException, *, lost: bool = False) -> None:
        """Make an error of this rank the outcome of its next number, unless every rank has it already.

        Never raises because of the store: the caller is about to raise `error`, which matters more.
        """
        if self.lost is not None or vars(error).get(_TOLD) == (id(self), self._number):
            return
        failure = Failure.of(operation, self.rank, error, lost=lost)
        try:
            # This rank may have been interrupted in a meeting that took place all the same: then it
            # is the next number that the others have yet to come to.
            while not isinstance(held := self._decide(_Place(self._number, operation), failure), Failure):
                self._advance()
        except RuntimeError as broken:
            self.lost = _store_failure(operation, broken)
        else:
            self._advance()
            self.lost = held if held.lost else None
        self._mark(error)

    def lose(self, operation: str, cause: BaseException) -> WeightproofError:
        """The error for a payload that broke after all ranks had come: who gives no sign of life?"""
        place, timed_out = _Place(self._number, operation), "timed out" in str(cause).lower()
        patience = SIGNS_OF_LIFE_AT_THE_LIMIT_SECONDS if timed_out else SIGNS_OF_LIFE_SECONDS
        deadline = time.monotonic() + min(self.timeout, patience)
        with self._store_answers(operation):
            self._store.ask(self._word(place))
            self._poll(lambda: self._decided(place.number) or not self._silent(place.number), deadline)
            silent = self._silent(place.number)
            who = f"no sign of life from {named(silent)}" if silent else "all ranks still answer"
            message = f"{operation}: the connection between ranks broke ({who}): {_first_sentence(cause)}"
            failure = Failure(operation, silent, message, timed_out=timed_out, lost=True)
            held = self._decide(place, failure)
        self._advance()
        return self.shared(replace(held, lost=True) if isinstance(held, Failure) else failure)

    def shared(self, failure: Failure) -> WeightproofError:
        """The error for a failure that every rank sees by itself, right after a meeting."""
        if failure.lost:
            self.lost = failure
        error = failure.error()
        self._mark(error)
        return error

    def raise_if_lost(self) -> None:
        """Raise at once what ended the meetings, if something did."""
        if self.lost is not None:
            raise self.shared(self.lost)

    def _come(self, operation: str, note: str) -> _Outcome:
        place = _Place(self._number, operation, note)
        leave_word = self._word(place)

        def arrive(store: Store) -> int:
            leave_word(store)
            return store.add(f"{place.number}/count", 1)

        if self._store.ask(arrive) == self.size:
            outcome = self._decide(place, self._verdict(operation))
        elif self._poll(lambda: self._decided(place.number), time.monotonic() + self.timeout):
            outcome = self._store.ask(lambda store: _decoded(store.get(f"{place.number}/outcome")))
        else:
            outcome = self._decide(place, self._overdue(place.number, operation))
        if not isinstance(outcome, Failure):
            self._forget_older()
        self._advance()
        return outcome

    def _verdict(self, operation: str) -> _Outcome:
        """The outcome when all ranks have come: the notes, or that they came to different operations."""
        places = self._places()
        if all(place.operation == operation for place in places):
            return [place.note for place in places]
        at = "; ".join(f"rank {rank} at '{place.operation}'" for rank, place in enumerate(places))
        others = tuple(rank for rank, place in enumerate(places) if place.operation != places[0].operation)
        message = f"the ranks are at different operations ({at}); every rank must make the same calls in the same order"
        return Failure(places[0].operation, others, message)

    def _overdue(self, number: int, operation: str) -> Failure:
        """Names the ranks that have not come, and where they were last seen."""
        ranks = range(self.size)
        known = self._store.ask(lambda store: [rank for rank in ranks if store.check([f"at/{rank}"])])
        places = dict(zip(known, self._places(known), strict=True))
        missing = tuple(rank for rank in ranks if rank not in places or places[rank].number < number)
        if not missing:
            others = tuple(rank for rank in ranks if rank != self.rank)
            message = (
                f"{operation}: all ranks came, but the last of them ({'one of ' * (len(others) > 1)}{named(others)}) "
                f"did not say so within {self.timeout:g} s. Look at its log"
            )
            return Failure(operation, others, message, timed_out=True, lost=True)
        seen = "; ".join(
            f"rank {rank} was last seen at '{places[rank].operation}'" if rank in places else f"rank {rank} never came"
            for rank in missing
        )
        message = (
            f"{named(missing)} did not come to '{operation}' within {self.timeout:g} s ({seen}). Look at the "
            "log of that rank; if it is only slow, raise the timeout"
        )
        return Failure(operation, missing, message, timed_out=True, lost=True)

    def _places(self, ranks: Iterable[int] | None = None) -> list[_Place]:
        """Where ranks (all of them, unless named) that came at least once were last seen."""
        keys = [f"at/{rank}" for rank in (range(self.size) if ranks is None else ranks)]
        texts = self._store.ask(lambda store: store.multi_get(keys))
        return [_Place(*json.loads(text)) for text in texts]

    def _silent(self, number: int) -> tuple[int, ...]:
        return tuple(rank for rank, place in enumerate(self._places()) if not place.passed(number))

    def _word(self, place: _Place) -> Callable[[Store], None]:
        key, text = f"at/{self.rank}", json.dumps([place.number, place.operation, place.note, place.done])
        return lambda store: store.set(key, text)

    def _decided(self, number: int) -> bool:
        return self._store.ask(lambda store: store.check([f"{number}/outcome"]))

    def _decide(self, place: _Place, outcome: _Outcome) -> _Outcome:
        """Write an outcome, unless there is one; return the one that there is."""
        leave_word, key, text = self._word(place), f"{place.number}/outcome", _encoded(outcome)

        def decide(store: Store) -> bytes:
            leave_word(store)
            return store.compare_set(key, "", text)

        return _decoded(self._store.ask(decide))

    def _poll(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Whether `condition` came true in time."""
        # A wait of the store itself would warn on stderr when it ends, and hold up other threads.
        started = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now > deadline:
                return False
            time.sleep(min(POLL_SHARE * (now - started), LONGEST_POLL_SECONDS, max(deadline - now, 0)))
        return True

    def _advance(self) -> None:
        if self.rank == 0:
            self._old_keys += [f"{self._number}/count", f"{self._number}/outcome"]
        self._number += 1

    def _forget_older(self) -> None:
        """All ranks have come to this meeting, so each has read the outcomes of those before it."""
        keys, self._old_keys = self._old_keys, []
        if keys:
            self._store.ask(lambda store: [store.delete_key(key) for key in keys])

    @contextmanager
    def _store_answers(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # DistStoreError and DistNetworkError are RuntimeErrors
            raise self.shared(_store_failure(operation, error)) from error

    def _mark(self, error: BaseException) -> None:
        """Remember that all ranks have this error, until the next meeting."""
        vars(error)[_TOLD] = (id(self), self._number)


def _first_sentence(cause: BaseException) -> str:
    """Gloo's messages start with a line of its source and go on with guesses."""
    return re.sub(r"^\[[^]]*\] ", "", str(cause)).split(". ")[0][:LONGEST_MESSAGE]


def _store_failure(operation: str, error: RuntimeError) -> Failure:
    launcher = dist.is_torchelastic_launched()
    host = "the launcher" if launcher else "rank 0"
    message = f"{operation}: the store of torch.distributed does not answer; {host}, which hosts it, has probably ended"
    return Failure(operation, () if launcher else (0,), f"{message} ({_first_sentence(error)})", lost=True)
