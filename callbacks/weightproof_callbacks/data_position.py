"""The data position: which batches a run was given, and how it is given them again, or never again.

A data loader cannot be wound back: its iterator has moved on, its sampler has drawn the order, its workers are
ahead. So the batches themselves are remembered since the oldest state that a run may go back to, and a
rollback either gives them once more (`rewind`) or forgets them (`skip`); the loader always goes on from where
it is. The generators of samplers and loaders are ahead with it and are never wound back.

Fetching can draw from the global generators (a shuffled epoch begins, a transform is random). What the
fetch of a batch drew is remembered with the batch, and drawn again when it is given again.

A run that was killed has no iterator any more: it goes on by its place in the data (see `data_place`).
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import UserDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightproof.errors import InputError
from weightproof.snapshots.tensor_store import readable
from weightproof_callbacks.data_place import DataPlace, Places, rest_of
from weightproof_callbacks.generator_state import GlobalDraws

logger = logging.getLogger("weightproof.data")

__all__ = ["BatchMemory", "Mark", "ReplayableLoader"]

MAX_BYTES = 1 << 30
_NOTHING = object()


@dataclass(slots=True)
class _Given:
    """One batch as it was given, with what fetching it did to the process."""

    batch: Any
    versions: list[tuple[torch.Tensor, int]]
    nbytes: int
    ends_epoch: bool | None
    draws: tuple[GlobalDraws, GlobalDraws] | None
    place: DataPlace


class Mark:
    """A position among the batches; as long as it lives, every later batch is remembered."""

    __slots__ = ("__weakref__", "lost", "position")

    def __init__(self, position: int) -> None:
        self.position = position
        self.lost: str | None = None


class BatchMemory:
    """Remembers the batches of a run since the oldest living `Mark`.

    Args:
        max_bytes: Size of the tensors that may be kept alive for this; beyond it, older marks cannot be
            rewound to (they can still be skipped to).
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < 1:
            raise InputError(f"max_bytes must be positive, not {max_bytes}")
        self._max_bytes = max_bytes
        self._marks: weakref.WeakSet[Mark] = weakref.WeakSet()
        self._latest: weakref.ref[Mark] | None = None
        self._given: list[_Given] = []
        self._first = 0  # position of `_given[0]`
        self._pending: deque[_Given] = deque()
        self._live: Iterator[Any] | None = None
        self._stream: _Stream | None = None
        self._owed = 0  # batches that this pass is behind, because it gave so many twice
        self._registered: Any = None
        self._warned = False
        self.places = Places()

    @property
    def position(self) -> int:
        """How many batches were given, not counting those that were taken back."""
        return self._first + len(self._given)

    @property
    def nbytes(self) -> int:
        """Size of the remembered batches."""
        return sum(given.nbytes for given in (*self._given, *self._pending))

    def place(self) -> DataPlace:
        """The batch that comes next, in a form that outlives the process."""
        return self._pending[0].place if self._pending else self.places.now()

    # -- going back ----------------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present position. Keep the mark for as long as the run may go back to it."""
        self._forget_unreachable()
        found = Mark(self.position)
        self._marks.add(found)
        self._latest = weakref.ref(found)
        return found

    def require_rewindable(self, mark: Mark | None = None) -> None:
        """Refuse a rewind that could not give the same batches.

        Raises:
            InputError: The mark is not one of this memory or was passed by a rollback, too much was to be
                remembered, or a batch was written to in place since it was given.
        """
        mark = self._known(mark)
        if mark.lost is not None:
            raise InputError(f'the batches cannot be given again: {mark.lost}. Choose data="skip"')
        for given in self._given[mark.position - self._first :]:
            if any(tensor._version != version for tensor, version in given.versions):
                raise InputError(
                    "the batches cannot be given again: training wrote into one of them in place. Work on copies, "
                    'or choose data="skip"'
                )

    def rewind(self, mark: Mark | None = None) -> int:
        """Give the batches since `mark` (by default the latest) again, before any other.

        Returns:
            How many batches that are.

        Raises:
            InputError: As `require_rewindable`; nothing was changed.
        """
        self.require_rewindable(mark)
        return self._take_back(self._known(mark), again=True)

    def skip(self, mark: Mark | None = None) -> int:
        """Forget the batches since `mark` (by default the latest): they are never given again.

        Returns:
            How many batches that are.
        """
        return self._take_back(self._known(mark), again=False)

    def _take_back(self, mark: Mark, *, again: bool) -> int:
        start = max(mark.position - self._first, 0)
        taken = self._given[start:]
        count = self.position - mark.position
        del self._given[start:]
        if mark.lost is not None:
            self._first, mark.lost = mark.position, None
        if again:
            self._pending.extendleft(reversed(taken))
            self._owed += count
        for later in [one for one in self._marks if one.position > mark.position]:
            self._marks.discard(later)
        self._latest = weakref.ref(mark)
        return count

    def _known(self, mark: Mark | None) -> Mark:
        found = mark if mark is not None else self._latest() if self._latest is not None else None
        if found is None or found not in self._marks:
            raise InputError("there is no such position: mark() it, and keep the mark, before going back to it")
        return found

    # -- giving --------------------------------------------------------------------------------

    def over(self, iterator: Iterator[Any], owner: Any = None) -> Iterator[Any]:
        """The batches of `iterator`, those that are to be given again before them.

        Where batches were taken back and a loop counts steps, it begins the next epoch before it has seen
        the last batches of this one. They are given first then, and the new epoch after them: the stream of
        batches is the one that it would have been.

        Args:
            iterator: One pass over the data.
            owner: The loader that it belongs to, if it is one of accelerate's: its `end_of_dataloader` tells
                gradient accumulation where an epoch ends.
        """
        if self._stream is None or self._stream.iterator is not iterator:
            behind = self._owed - len(self._pending) if self._live is not None else 0
            self._stream = _Stream(self, iterator, owner, getattr(owner, "iteration", None), behind)
            self._stream.number, self._stream.skipped = self.places.count_pass()
        return self._stream

    def take(self, stream: _Stream) -> Any:
        """The next batch of a stream.

        Raises:
            StopIteration: There is none.
        """
        if self._pending:
            return self._again(self._pending.popleft(), stream.owner)
        self._unregister(stream.owner)
        before = GlobalDraws.now() if self._marks else None
        batch = self._fetched(stream)
        place = self.places.arrived()
        if before is not None:
            self._remember(batch, before, stream.owner, place)
        else:
            self._first += 1 + len(self._given)
            self._given.clear()
        return batch

    def _fetched(self, stream: _Stream) -> Any:
        if stream.iterator is not self._live:
            if stream.behind > 0 and self._live is not None:
                stream.behind -= 1
                batch = next(self._live, _NOTHING)
                if batch is not _NOTHING:
                    return batch
            # The loader counts its passes by itself, and the old one may have ended after this one was begun.
            if stream.epoch is not None and hasattr(stream.owner, "set_epoch"):
                stream.owner.set_epoch(stream.epoch)
            self._live = stream.iterator
            self.places.began(stream.owner, stream.number, stream.skipped)
        try:
            return next(stream.iterator)
        except StopIteration:
            self._live, self._owed = None, 0
            self.places.ended()
            raise

    def _remember(self, batch: Any, before: GlobalDraws, owner: Any, place: DataPlace) -> None:
        after = GlobalDraws.now()
        tensors = [tensor for tensor in _tensors(batch) if not tensor.is_inference()]
        self._given.append(
            _Given(
                batch=_rewrapped(batch),
                versions=[(tensor, tensor._version) for tensor in tensors],
                nbytes=sum(tensor.nbytes for tensor in _tensors(batch)),
                ends_epoch=getattr(owner, "end_of_dataloader", None),
                draws=None if before.same_as(after) else (before, after),
                place=place,
            )
        )
        self._forget_unreachable()
        if self.nbytes > self._max_bytes:
            reason = f"more than {readable(self._max_bytes)} of batches were given since"
            for mark in self._marks:
                mark.lost = mark.lost or reason
            self._first += len(self._given)
            self._given.clear()

    def _again(self, given: _Given, owner: Any) -> Any:
        if given.draws is not None:
            self._draw_again(*given.draws)
        if given.ends_epoch is not None:
            self._register(owner)
            owner.end_of_dataloader = given.ends_epoch
        self._given.append(given)
        return _rewrapped(given.batch)

    def _draw_again(self, before: GlobalDraws, after: GlobalDraws) -> None:
        """Leave the generators as fetching the batch here would have left them."""
        now = GlobalDraws.now()
        drawn = after if now.same_as(before) else now.after_as_many(before, after)
        if drawn is not None:
            drawn.put_back()
        elif not self._warned:
            self._warned = True
            logger.warning(
                "a batch is given again whose fetch drew random numbers, and the generators stand elsewhere than they "
                "did then: the numbers drawn from here on differ from those of an undisturbed run"
            )

    def _register(self, owner: Any) -> None:
        """Show the owner to accelerate as the loader in use, also between two passes over it."""
        state = getattr(owner, "gradient_state", None)
        if self._registered is None:
            self._registered = (owner, owner.end_of_dataloader)
            if state is not None and all(held is not owner for held in state.dataloader_references):
                state._add_dataloader(owner)
                self._registered = (owner, None)

    def _unregister(self, owner: Any) -> None:
        if self._registered is None:
            return
        (owner, ended), self._registered = self._registered, None
        if ended is None:
            owner.gradient_state._remove_dataloader(owner)
        owner.end_of_dataloader = bool(ended)

    def _forget_unreachable(self) -> None:
        """Drop what no living mark goes back to."""
        oldest = min((mark.position for mark in self._marks if mark.lost is None), default=self.position)
        surplus = min(oldest - self._first, len(self._given))
        if surplus > 0:
            del self._given[:surplus]
            self._first += surplus


class _Stream:
    """One pass over the data, as a loop sees it."""

    def __init__(
        self, memory: BatchMemory, iterator: Iterator[Any], owner: Any, epoch: int | None, behind: int
    ) -> None:
        self.memory, self.iterator, self.owner = memory, iterator, owner
        self.epoch = epoch  # as the loader counted when this pass was begun
        self.behind = behind  # batches of the pass before that were not given yet
        self.number = self.skipped = 0  # which pass it is, and how many of its batches are left out

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        return self.memory.take(self)


class ReplayableLoader:
    """A data loader that can give its last batches again: `data = ReplayableLoader(data)`, after `prepare`.

    Everything else (`len`, `set_epoch`, `batch_sampler`, `dataset`...) is the loader's own. Batches are
    remembered only while a `Mark` is held, by reference and on their device, so a loop must not write into them.

    Args:
        loader: A `DataLoader`, what `accelerator.prepare` made of one, or anything that can be iterated over
            again and again.
        max_bytes: As in `BatchMemory`.
    """

    def __init__(self, loader: Iterable[Any], max_bytes: int = MAX_BYTES) -> None:
        if isinstance(loader, Iterator):
            raise InputError(f"{type(loader).__name__} can be iterated over once only: give the data loader itself")
        self.loader: Any = loader
        self.memory = BatchMemory(max_bytes)
        self._resumed_pass: int | None = None

    @property
    def epoch(self) -> int:
        """Number of the next pass, from 0: where a loop over passes begins in a run that goes on from disk."""
        return self.memory.places.next_pass

    def __iter__(self) -> Iterator[Any]:
        """One pass over the data; in a run that goes on from disk, first what is left of the pass it was in."""
        place = self.memory.places.resuming
        if place is None:
            if self._resumed_pass is not None and hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(self._resumed_pass + 1)  # the loader itself has not seen that pass
            self._resumed_pass = None
            return self.memory.over(_lazily(self.loader), self.loader)
        rest = rest_of(self.loader, place)
        self._resumed_pass = None if rest is self.loader else place.epoch
        self.memory.places.begin_pass(place.epoch, place.batch)
        return self.memory.over(_lazily(rest), self.loader)

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        """What is not about positions is the loader's."""
        if name in ("loader", "memory"):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def mark(self) -> Mark:
        """As `BatchMemory.mark`."""
        return self.memory.mark()

    def rewind(self, mark: Mark | None = None) -> int:
        """As `BatchMemory.rewind`."""
        return self.memory.rewind(mark)

    def skip(self, mark: Mark | None = None) -> int:
        """As `BatchMemory.skip`."""
        return self.memory.skip(mark)


def _lazily(loader: Iterable[Any]) -> Iterator[Any]:
    """One pass; what beginning it draws belongs to its first batch."""
    yield from loader


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)


def _rewrapped(batch: Any) -> Any:
    """The batch in containers of its own, around the same tensors: Trainer takes labels out of the dict."""
    if isinstance(batch, dict | UserDict):
        found = copy.copy(batch)
        for key in list(found):
            found[key] = _rewrapped(found[key])
        return found
    if isinstance(batch, list):
        return [_rewrapped(part) for part in batch]
    if isinstance(batch, tuple):
        parts = [_rewrapped(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch
