"""The last good states of a training run: how many are kept, which one a run goes back to, and when it has to stop.

A good state is the weights (a `SafePoint`), what was read of them, and what the run needs beside them: its
training state, which callers capture (`weightproof_callbacks.rolling_policy`). The library itself knows no optimizer.

Which one: the newest. The next older one where the newest is itself in doubt: the first loss after it was already
far too high, or the run was taken back not long ago (`cooldown`) and is in trouble again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from weightproof.baseline import Baseline
from weightproof.errors import InputError, RestoreError
from weightproof.probes import State
from weightproof.snapshots.ring_stores import KeepWeights
from weightproof.snapshots.tensor_store import Store, readable
from weightproof.transactions.steps import SafePoint

logger = logging.getLogger("weightproof")

__all__ = ["Disk", "GoodState", "Rolling", "RollingOptions", "TrainingPart", "place_of_snapshots"]

SNAPSHOTS = ("memory", "pinned", "disk")
ROLLBACK_MODES = ("full", "weights")
DATA_MODES = ("skip", "replay")


@dataclass(frozen=True, slots=True)
class RollingOptions:
    """How a run is taken back, and how often.

    Attributes:
        rollback: "full": weights, and all that the run needs beside them (moments, schedule, generators). "weights":
            the weights; moments are cleared, everything else runs on. Costs no memory beside the weights.
        data: "skip": the batches of the rejected window are not given again. "replay": they are, before any others.
        lr_factor: The learning rate is multiplied by this after every rollback; None leaves it.
        max_rollbacks: Rollbacks of a run; the violation after them halts it. None: any number.
        keep: Good states that are kept.
        snapshots: Where: "memory" (each copy beside its original), "pinned" (in host memory, pinned where the originals
            lie on CUDA), "disk" (a folder; a run that was killed goes on from there).
        snapshot_budget: Bytes that they may take together: in memory on one process, on disk on all of them; older
            ones are dropped first, the newest never.
        cooldown: Checks after a rollback within which another violation goes back to the next older state.

    Raises:
        InputError: On construction, if one is out of its range.
    """

    rollback: str = "full"
    data: str = "skip"
    lr_factor: float | None = None
    max_rollbacks: int | None = 3
    keep: int = 2
    snapshots: str = "memory"
    snapshot_budget: int | None = None
    cooldown: int = 2

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, known in (("rollback", ROLLBACK_MODES), ("data", DATA_MODES), ("snapshots", SNAPSHOTS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.rollback == "weights" and self.data == "replay":
            raise InputError(
                'data="replay" gives the batches of a window again to the run that had them first: it needs '
                'rollback="full"'
            )
        for name, least in (("keep", 1), ("cooldown", 0)):
            _require_whole(name, getattr(self, name), least)
        for name, least in (("max_rollbacks", 0), ("snapshot_budget", 1)):
            if getattr(self, name) is not None:
                _require_whole(name, getattr(self, name), least)
        factor = self.lr_factor
        if factor is not None and not (_is_number(factor) and math.isfinite(factor) and 0.0 < factor <= 1.0):
            raise InputError(f"lr_factor must be a number above 0 and at most 1, or None, not {factor!r}")

    def in_words(self) -> dict[str, str]:
        """Every option, to be compared between processes."""
        return {f"guard's {name}": str(value) for name, value in asdict(self).items()}


def place_of_snapshots(snapshots: str | None, folder: object) -> str:
    """Where good states are kept: as was asked for, else on disk where there is a folder.

    Raises:
        InputError: What was asked for and the folder do not go together.
    """
    if snapshots is None:
        return "memory" if folder is None else "disk"
    if snapshots == "disk" and folder is None:
        raise InputError('snapshots="disk" needs a folder that outlives the run: give snapshot_dir=')
    if snapshots != "disk" and folder is not None:
        raise InputError(f'snapshot_dir= is where snapshots="disk" are kept: leave it out, or snapshots={snapshots!r}')
    return snapshots


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number, {least} or more, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class TrainingPart(Protocol):
    """What a run needs beside its weights, as it was at a good state."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        ...

    def put_back(self) -> Mapping[str, Any]:
        """Put it back, or raise `RestoreError`; gives notes for the record of the step."""
        ...

    def parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors and JSON values that it can be made from again."""
        ...


@dataclass(frozen=True, slots=True)
class GoodState:
    """A state that a run can go back to.

    Attributes:
        point: The weights.
        training: What belongs to them; None where nobody captures it.
        current: What was read of these weights.
        baseline: What edits were judged against then.
        step: Step of the run.
        number: Of its snapshot on disk; None where it is in memory.
    """

    point: SafePoint
    training: TrainingPart | None
    current: State
    baseline: Baseline
    step: int
    number: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.point.snapshot.nbytes + (0 if self.training is None else self.training.nbytes)


@dataclass(frozen=True, slots=True)
class Rollback:
    """One that was done: at which step, to which, and why."""

    step: int
    to: int
    reason: str


class Disk(Protocol):
    """What keeps good states on disk. All ranks make the same calls."""

    def keep(self, tensors: Mapping[str, Tensor]) -> Store:
        """Stand for the weights of a state until `commit` has saved them."""
        ...

    def commit(self, state: GoodState) -> GoodState:
        """Save a state, and drop older ones beyond the budget."""
        ...

    def has(self, state: GoodState) -> bool:
        """Whether a state is still there."""
        ...

    def forget(self, state: GoodState) -> None:
        """Remove a state: a run that is killed now must not go on from it."""
        ...

    def damage(self, state: GoodState) -> str | None:
        """What is wrong with a state; None when every byte of it is proven."""
        ...


class Rolling:
    """The good states of one run, newest last, and the rollbacks so far. All ranks make the same calls.

    Args:
        options: See there.
        capture: Called at every good state: the training state that belongs to it.
        disk: Keeps the states; None: they stay in memory.
        weights: Keeps the weights of a state, where `disk` does not; None: in memory, each beside its original.
    """

    def __init__(
        self,
        options: RollingOptions | None = None,
        capture: Callable[[], TrainingPart | None] | None = None,
        disk: Disk | None = None,
        weights: KeepWeights | None = None,
    ) -> None:
        # A session without a training loop around it sets no limit of its own to how often it is asked.
        self.options = options or RollingOptions(max_rollbacks=None)
        self.capture = capture
        self.disk = disk
        self.weights = weights if disk is None else disk.keep
        self.rollbacks: list[Rollback] = []
        self._states: list[GoodState] = []
        self._checks_since: int | None = None
        self._warned = False

    @property
    def newest(self) -> GoodState | None:
        """The last good state; None before the first."""
        return self._states[-1] if self._states else None

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the states that are kept, oldest first."""
        return tuple(state.step for state in self._states)

    @property
    def nbytes(self) -> int:
        """Bytes of all states on this process."""
        return sum(state.nbytes for state in self._states)

    def make_room(self) -> None:
        """Free what the next state will push out: before it is captured, so that both never lie in memory."""
        while len(self._states) >= self.options.keep:
            self._drop(0)

    def restart(self) -> None:
        """Forget every state: the run must not go back behind this moment (a kept edit, a resumed checkpoint)."""
        while self._states:
            self._drop(0)

    def push(self, state: GoodState, sizes: Callable[[int], int] = int) -> None:
        """Take a state as the last good one.

        Args:
            state: The newest.
            sizes: Gives the largest of the processes' numbers, so that all of them drop the same states.
        """
        self._states.append(state if self.disk is None else self.disk.commit(state))
        budget = self.options.snapshot_budget
        if self.disk is not None:
            while not self.disk.has(self._states[0]):
                self._drop(0)
            return
        if budget is None:
            return
        totals = [sizes(sum(one.nbytes for one in self._states[i:])) for i in range(len(self._states))]
        while len(self._states) > 1 and totals[0] > budget:
            totals.pop(0)
            self._drop(0)
        if totals[0] > budget:
            self._over(totals[0], budget)

    def _over(self, size: int, budget: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "one good state takes %s and snapshot_budget allows %s: only the newest is kept. Raise it, choose "
                'rollback="weights", or give a snapshot_dir',
                readable(size),
                readable(budget),
            )

    def kept(self) -> None:
        """A window was kept."""
        if self._checks_since is not None:
            self._checks_since += 1

    def choose(self, step: int, reason: str, *, doubtful: bool = False) -> GoodState:
        """The state to go back to now; newer ones are dropped, and the rollback is counted.

        Args:
            step: Step of the run.
            reason: Why.
            doubtful: Whether the newest state is itself in doubt.

        Raises:
            InputError: There is none.
            RestoreError: There was one on disk, and it is damaged.
        """
        again = self._checks_since is not None and self._checks_since < self.options.cooldown
        if len(self._states) > 1 and (doubtful or again):
            self._disown()
        if not self._states:
            raise InputError("there is no good state to go back to: call session.watch() when training begins")
        self._pass_over_damaged()
        self._checks_since = 0
        self.rollbacks.append(Rollback(step, self._states[-1].step, reason))
        return self._states[-1]

    def _pass_over_damaged(self) -> None:
        """Leave out states that could not be put back whole, before anything is written."""
        while self.disk is not None and (damage := self.disk.damage(self._states[-1])):
            if len(self._states) == 1:
                raise RestoreError(f"no good state is left to go back to: {damage}")
            logger.warning(
                "the good state of step %d is damaged and is passed over for that of step %d: %s",
                self._states[-1].step,
                self._states[-2].step,
                damage,
            )
            self._disown()

    def _disown(self) -> None:
        """The newest state is none that the run may go back to, or go on from."""
        if self.disk is not None:
            self.disk.forget(self._states[-1])
        self._drop(-1)

    @property
    def exhausted(self) -> bool:
        """Whether the run was taken back more often than it may be."""
        limit = self.options.max_rollbacks
        return limit is not None and len(self.rollbacks) > limit

    def tried(self) -> str:
        """What was tried, for the message that ends a run."""
        done = "; ".join(f"at step {one.step} back to step {one.to}" for one in self.rollbacks)
        options = self.options
        how = f"rollback={options.rollback!r}, data={options.data!r}, lr_factor={options.lr_factor}"
        return (
            f"{len(self.rollbacks) - 1} rollbacks ({how}) did not help, and max_rollbacks={options.max_rollbacks}. The "
            f"last good state, of step {self.rollbacks[-1].to}, is in place. Tried: {done}"
        )

    def _drop(self, index: int) -> None:
        self._states.pop(index).point.snapshot.discard()
