"""Where a run stands in its data, in a form that outlives the process: a run that was killed goes on from there.

A place is the pass over the data, how many batches of it were given, and where the generators stood when the pass
began: they have drawn its order. A loader of the same data, given the same generators, gives the same pass again; the
batches that were given are left out without being read, where its sampler allows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

from weightproof.errors import RestoreError
from weightproof_callbacks.generator_state import GlobalDraws
from weightproof_callbacks.state_values import Values

__all__ = ["DataPlace", "PassStart", "Places", "rest_of"]

_PREFIX = "data/"
# Where loaders, and the samplers in them, keep what they wrap.
_INSIDE = ("base_dataloader", "batch_sampler", "sampler")
_GENERATORS = ("generator", "synchronized_generator")


class PassStart:
    """Where the generators stood when a pass over the data began: the global ones, and those of its loader."""

    def __init__(self, values: Values) -> None:
        self.values = values

    @classmethod
    def now(cls, loader: Any) -> PassStart:
        """Read them; nothing is drawn."""
        own = [generator.get_state() for generator in _own_generators(loader)]
        return cls(Values.copied({"global": GlobalDraws.now().values, "own": own}, "data"))

    def put_back(self, loader: Any) -> None:
        """Set them.

        Raises:
            RestoreError: The loader has other generators than the one that was read.
        """
        found, own = self.values.value(), _own_generators(loader)
        if len(found["own"]) != len(own):
            raise RestoreError(
                f"the data of this run cannot be given as before: its loader draws from {len(own)} generators of its "
                f"own, and the one that the state was kept with from {len(found['own'])}"
            )
        GlobalDraws(found["global"]).put_back()
        for generator, state in zip(own, found["own"], strict=True):
            generator.set_state(state)


class DataPlace:
    """A place in the data: the batch that comes next.

    Attributes:
        epoch: Number of the pass over the data, from 0.
        batch: Batches of this pass that were given.
        start: The generators at the beginning of the pass.
    """

    def __init__(self, epoch: int, batch: int, start: PassStart) -> None:
        self.epoch, self.batch, self.start = epoch, batch, start

    def parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors and JSON that it can be made from again."""
        values = self.start.values
        return (
            {f"{_PREFIX}{name}": tensor for name, tensor in values.tensors.items()},
            {"epoch": self.epoch, "batch": self.batch, "start": values.tree},
        )

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> DataPlace:
        """What `parts` gave; further tensors are left alone."""
        own = {name.removeprefix(_PREFIX): one for name, one in tensors.items() if name.startswith(_PREFIX)}
        return cls(int(values["epoch"]), int(values["batch"]), PassStart(Values(values["start"], own)))


class Places:
    """Counts the batches of a run by pass, as they come from its loader.

    Attributes:
        next_pass: Number of the pass that is begun next, from 0.
    """

    def __init__(self) -> None:
        self.next_pass = 0
        self._skipped = 0
        self._owner: Any = None
        self._now: DataPlace | None = None  # None between two passes
        self._resumed: tuple[DataPlace, Callable[[], None]] | None = None

    def now(self) -> DataPlace:
        """The place of the batch that the loader gives next."""
        if self._resumed is not None:
            return self._resumed[0]
        now = self._now
        if now is not None and now.batch != _length(self._owner):
            return now
        epoch = self.next_pass if now is None else now.epoch + 1
        return DataPlace(epoch, 0, PassStart.now(self._owner))

    def go_on_at(self, place: DataPlace, then: Callable[[], None]) -> None:
        """Begin where another process was; nothing was given yet. Whoever reads the data asks `resuming` for it.

        Args:
            place: As `now` gave it.
            then: Called once the first batch is there: puts the generators where they stood at that place, which
                beginning the pass again has moved on from.
        """
        # At the beginning of a pass they stand there, and what beginning it draws is not to be taken back.
        self.next_pass, self._resumed = place.epoch, (place, then if place.batch else _nothing)

    @property
    def resuming(self) -> DataPlace | None:
        """Where the next pass is to go on; None: at its beginning."""
        return None if self._resumed is None else self._resumed[0]

    def begin_pass(self, number: int, skipped: int = 0) -> None:
        """Tell which pass the next one is, and how many of its batches its iterator leaves out."""
        self.next_pass, self._skipped = number, skipped

    def count_pass(self) -> tuple[int, int]:
        """Number of the pass that somebody asks for now, and how many of its batches are left out."""
        found = self.next_pass, self._skipped
        self.next_pass, self._skipped = self.next_pass + 1, 0
        return found

    def began(self, owner: Any, number: int, skipped: int) -> None:
        """A pass is about to be read; one that another process began, with the generators of that time.

        Raises:
            RestoreError: The loader has other generators than it had then.
        """
        self._owner = owner
        start = PassStart.now(owner)
        if self._resumed is not None:
            start = self._resumed[0].start
            start.put_back(owner)
        self._now = DataPlace(number, skipped, start)

    def arrived(self) -> DataPlace:
        """A batch came from the loader; gives its place."""
        now = self._now
        assert now is not None  # no batch comes before its pass began
        self._now = DataPlace(now.epoch, now.batch + 1, now.start)
        self._settle()
        return now

    def ended(self) -> None:
        """The loader has no more in this pass."""
        self._now = None
        self._settle()

    def _settle(self) -> None:
        if self._resumed is not None:
            (_, then), self._resumed = self._resumed, None
            then()


def rest_of(loader: Any, place: DataPlace) -> Iterable[Any]:
    """The loader of what is left of a pass.

    Args:
        loader: The run's own loader; it counts this pass as the place does, from here on.
        place: Which pass, and how much of it was given.
    """
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(place.epoch)
    if place.batch == 0:
        return loader
    if isinstance(loader, DataLoader):
        return skip_first_batches(loader, place.batch)
    return _Rest(loader, place.batch)


class _Rest:
    """What is left of a pass of a loader that knows no positions: its beginning is read and dropped."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self._loader, self._count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._loader, self._count, None)


def _nothing() -> None:
    """Nothing is to be put back."""


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _own_generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and its samplers, in an order of their own; not those that are seeded by the pass."""
    found: dict[int, torch.Generator] = {}
    todo, seen = [loader], set[int]()
    while todo:
        holder = todo.pop(0)
        if holder is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        if not hasattr(holder, "initial_seed"):  # accelerate's seedable sampler
            every = (getattr(holder, name, None) for name in _GENERATORS)
            found |= {id(one): one for one in every if isinstance(one, torch.Generator)}
        todo += [getattr(holder, name, None) for name in _INSIDE]
    return list(found.values())
