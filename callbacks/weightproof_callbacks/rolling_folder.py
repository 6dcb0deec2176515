"""Good states on disk: a run that was killed goes on from the last one that was committed, and says so.

Each good state is saved whole (weights, the optimizer's masters, training state, the guard's losses) with
`weightproof.snapshots.store`: after a kill at any moment the old one or the new one is there, proven by digest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.session import GuardSession
from weightproof.snapshots.ring_stores import KeptSnapshot, SavedStore
from weightproof.snapshots.store import SnapshotFolder, SnapshotId
from weightproof.snapshots.tensor_store import Store
from weightproof.transactions.rolling import GoodState, TrainingPart

logger = logging.getLogger("weightproof")

__all__ = ["FOLDER", "RollingFolder"]

# Inside of the folder that was given: the snapshots of a session's edits lie beside it while they last.
FOLDER = "good-states"
_FORMAT = "weightproof-good-state-v1"
_WEIGHTS, _TRAINING = "weights/", "training/"
Remake = Callable[[Mapping[str, Tensor], Mapping[str, Any]], TrainingPart]


class RollingFolder:
    """The good states of one run, on disk. Every process makes the same calls.

    Args:
        path: Folder of the run.
        keep: How many are kept.
        budget: Bytes that they may take on the disk, those of all processes together.
        session: The session.
        remake: Makes a training state from what `TrainingPart.parts` gave.
        in_memory: Whether training states are kept in memory, too (batches can be given again only from there).

    Raises:
        SnapshotError: The folder is in use by another run, or cannot be written.
    """

    def __init__(  # noqa: PLR0913 - what keeps states, and what they are made of
        self, path: Path, keep: int, budget: int | None, session: GuardSession, remake: Remake, *, in_memory: bool
    ) -> None:
        self._folder = SnapshotFolder(path / FOLDER, budget, keep, processes=session.processes)
        self._session = session
        self._remake = remake
        self._in_memory = in_memory

    def close(self) -> None:
        """Free the lock; the states stay."""
        self._folder.close()

    def keep(self, tensors: Mapping[str, Tensor]) -> Store:
        """Stand for the weights of a state until `commit` has saved them."""
        return SavedStore(tensors)

    def commit(self, state: GoodState) -> GoodState:
        """Save a state: it counts once this returns.

        Returns:
            The state, all of it left on disk.

        Raises:
            SnapshotError: It cannot be saved; the states saved before are kept.
        """
        tensors, values = ({}, {}) if state.training is None else state.training.parts()
        snapshot = state.point.snapshot
        held = {f"{_WEIGHTS}{name}": tensor for name, tensor in snapshot.present().items()}
        held |= {f"{_TRAINING}{name}": tensor for name, tensor in tensors.items()}
        notes = {"format": _FORMAT, "losses": list(self._session.losses), "training": dict(values)}
        number = self._folder.save(state.step, held, notes)
        if isinstance(snapshot, KeptSnapshot) and isinstance(snapshot.store, SavedStore):
            snapshot.store.saved(self._folder.tensors(number), _WEIGHTS)
        if state.training is None or self._in_memory or not tensors:
            return replace(state, number=number)
        return replace(state, number=number, training=_OnDisk(self._folder, number, self._remake))

    def has(self, state: GoodState) -> bool:
        """Whether a state is still there: the budget prunes."""
        return state.number in self._folder.ids

    def forget(self, state: GoodState) -> None:
        """Remove a state: a run that is killed now does not go on from it."""
        if state.number is not None and self.has(state) and len(self._folder.ids) > 1:
            try:
                self._folder.remove(state.number)
            except SnapshotError as error:
                logger.warning("the rejected state of step %d stays on the disk: %s", state.step, error)

    def damage(self, state: GoodState) -> str | None:
        """What is wrong with a state; None when every byte of it, on every process, is proven."""
        if state.number is None:
            return None
        try:
            self._folder.verify(state.number)
        except RestoreError as error:
            return str(error)
        return None

    def resume(self, step: int, put_training: Callable[[Mapping[str, Tensor], Mapping[str, Any]], str]) -> int | None:
        """Put the newest committed state into the run, where it is of a later step than the run.

        Args:
            step: Step of the run.
            put_training: Puts a training state into the run, from what `TrainingPart.parts` gave; says what becomes of
                the data.

        Returns:
            Its step; None where there is nothing to go on from.

        Raises:
            RestoreError: The state on disk was altered, or could not be proven in place.
            InputError: It is of another model or of another run.
        """
        if not self._folder.ids:
            return None
        saved = self._folder.latest()
        if saved is None or saved.step <= step:
            return None
        if saved.values.get("format") != _FORMAT:
            raise InputError(f"{self._folder.path} holds snapshots of another kind: choose another snapshot_dir")
        self._session.continue_from(_below(saved.tensors, _WEIGHTS), [float(one) for one in saved.values["losses"]])
        with self._session.processes.together("restoring the training state"):
            data = put_training(_below(saved.tensors, _TRAINING), saved.values["training"])
        if self._session.processes.is_main:
            logger.warning(
                "%s holds the state of step %d: the run goes on from there. %s", self._folder.path, saved.step, data
            )
        return saved.step


class _OnDisk:
    """A training state that is read when it is needed."""

    nbytes = 0

    def __init__(self, folder: SnapshotFolder, number: SnapshotId, remake: Remake) -> None:
        self._folder = folder
        self._number = number
        self._remake = remake

    def put_back(self) -> Mapping[str, Any]:
        return self._remake(*self.parts()).put_back()

    def parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        saved = self._folder.load(self._number)
        return _below(saved.tensors, _TRAINING), saved.values["training"]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
