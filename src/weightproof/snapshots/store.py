"""Snapshots of a run in a folder: old or new after a crash, what did not change stored once, every read proven.

    with SnapshotFolder("snapshots", keep=2, budget=20 << 30) as folder:
        saved = folder.latest()            # None in a fresh folder
        ...
        folder.save(step, tensors, values)

Every process has a sub-folder of its own (`weightproof.snapshots.part`), so that no two write to the same file. A
snapshot exists when rank 0's manifest does: it is written last, after the objects and the other ranks' manifests,
whose digests it names, are on the disk. Pruning goes the other way round. See docs/snapshots.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from weightproof.collective import Processes
from weightproof.errors import InputError, RestoreError, SnapshotError
from weightproof.folders.files import DISK, FileSystem, make_folders, reason_of
from weightproof.snapshots.manifest import Manifest
from weightproof.snapshots.part import KeptTensors, Plan, RankFolder, Saved, SnapshotId
from weightproof.snapshots.store_lock import LOCK_FILE, HeldLock, lock_folder
from weightproof.snapshots.tensor_files import file_size, object_name
from weightproof.snapshots.tensor_store import readable

__all__ = ["KeptTensors", "Opened", "Saved", "SnapshotFolder", "SnapshotId"]

logger = logging.getLogger("weightproof")

_OPENING, _SAVING, _LOADING, _PRUNING = (f"{what} snapshots" for what in ("opening", "saving", "loading", "pruning"))


@dataclass(frozen=True)
class Opened:
    """What was found when a folder was opened.

    Attributes:
        ids: The committed snapshots, oldest first, the same on every rank.
        step: Step of the newest; None where there is none, or where this rank's part of it is damaged.
        removed: Leftovers of an interrupted save or prune that this rank removed, relative to its sub-folder.
        damaged: Those of `ids` whose manifest on this rank is gone or altered.
    """

    ids: tuple[SnapshotId, ...]
    step: int | None
    removed: tuple[str, ...]
    damaged: tuple[SnapshotId, ...]


class SnapshotFolder:
    """The snapshots of one run. Every rank makes the same calls in the same order.

    Making one locks the folder, finds the committed snapshots and removes what an interrupted save left
    (see `opened`, and the log).

    Args:
        path: Folder of the run; made if it is missing.
        budget: Most bytes that the tensors' files of all ranks may take once a save has ended; older snapshots are
            pruned, never the newest. During a save the new snapshot lies beside the old ones.
        keep: Most snapshots that are kept.
        processes: All ranks of the run; None for one process.
        files: Where to write; for tests.

    Raises:
        SnapshotError: If the folder is in use by another run, cannot be written, has no locks, or holds snapshots
            of another number of processes. What lies there is kept.
        InputError: If `budget` or `keep` is not a positive number.
        CollectiveError: If another rank failed (also from all methods that save, load or remove).
    """

    def __init__(
        self,
        path: Path | str,
        budget: int | None = None,
        keep: int = 2,
        *,
        processes: Processes | None = None,
        files: FileSystem = DISK,
    ) -> None:
        if keep < 1 or (budget is not None and budget < 1):
            raise InputError(f"keep and budget must be at least 1, not {keep} and {budget}")
        self.path, self.budget, self.keep = Path(path), budget, keep
        self._processes = processes or Processes.alone()
        self._files = files
        home = self.path / _rank_folder(self._processes.rank, self._processes.size)
        self._part = RankFolder(home, self._processes.rank, self._processes.size, files)
        self._lock_path = (self.path if self._processes.is_main else home) / LOCK_FILE
        self._lock: HeldLock | None = None
        self._kept: dict[int, Manifest | None] = {}
        self._next = 1
        self._unfinished = False
        try:
            with self._processes.together(_OPENING):
                self._take_lock()
                self._part.prepare()
            self.opened = self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The folder itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the lock."""
        self.close()

    @property
    def ids(self) -> tuple[SnapshotId, ...]:
        """The committed snapshots, oldest first."""
        return tuple(SnapshotId(number) for number in sorted(self._kept))

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any] | None = None
    ) -> SnapshotId:
        """Write a snapshot, commit it on all ranks, then prune.

        Tensors whose digest a kept snapshot has are not written again.

        Args:
            step: Step of the run.
            tensors: By name; of a sharded tensor the part that lies here. Not to be changed until this returns.
            values: JSON: text as keys, and None, bool, int, float, text, lists and dictionaries as values.

        Returns:
            Its number: larger than that of every snapshot before it.

        Raises:
            SnapshotError: If it cannot be written (disk full, input/output error, read-only, folder gone), is larger
                than the budget, or has a value or dtype that cannot be kept. The snapshots saved before are kept and
                nothing of the new one counts.
        """
        with self._processes.together(_SAVING):
            self._require_lock()
        if self._unfinished:  # the disk may be full of what the last save left
            self._sweep(_SAVING)
        self._unfinished = True
        with self._processes.together(_SAVING):
            plan = self._part.plan(self._next, step, tensors, values or {}, self._sound())
        self._require_within_budget(plan.manifest)
        manifest = self._commit(plan, self._stage(plan))
        self._kept[manifest.id] = manifest
        self._next += 1
        self._unfinished = False
        try:
            self.prune()
        except SnapshotError as error:
            logger.warning("snapshot %d was saved, but older ones could not be removed: %s", manifest.id, error)
        return SnapshotId(manifest.id)

    def latest(self) -> Saved | None:
        """Read the newest snapshot of which every bit, on every rank, is as it was written; the same one on every rank.

        One that is damaged is passed over, and the log says so: it no longer counts, and the next save removes it.

        Returns:
            The snapshot; None if there was never one.

        Raises:
            RestoreError: If snapshots are there, and every one is damaged; nothing is removed.
        """
        damaged: dict[SnapshotId, RestoreError] = {}
        for number in self.ids[::-1]:
            try:
                saved = self.load(number)
            except RestoreError as error:
                damaged[number] = error
                continue
            self._pass_over(damaged, saved)
            return saved
        if damaged:
            reasons = "; ".join(str(error) for error in damaged.values())
            raise RestoreError(f"no snapshot in {self.path} can be used: {reasons}")
        return None

    def _pass_over(self, damaged: Mapping[SnapshotId, RestoreError], saved: Saved) -> None:
        for number, error in damaged.items():
            # What it holds must not be taken for stored, should the run come to the same tensors again.
            del self._kept[number]
            if self._processes.is_main:
                logger.warning(
                    "%s: the newer snapshot %d is damaged and is passed over; snapshot %d (step %d) is used in its "
                    "place, and the next save removes the damaged one: %s",
                    self.path,
                    number,
                    saved.id,
                    saved.step,
                    error,
                )

    def load(self, number: SnapshotId | int) -> Saved:
        """Read a snapshot and prove every byte of it.

        Raises:
            InputError: If there is no such snapshot.
            RestoreError: If any bit of it, on any rank, is not the one that was written. Another one is never given in
                its place.
        """
        with self._processes.together(_LOADING):
            self._require_known(number)
            try:
                return self._part.read(number, self._kept[number])
            except RestoreError as error:
                others = [each for each in self.ids if each != number]
                raise RestoreError(
                    f"snapshot {number} cannot be used: {error}. Besides it the folder has {_listed(others)}"
                ) from error

    def verify(self, number: SnapshotId | int) -> None:
        """Prove every byte of a snapshot, on all ranks, and keep nothing of it in memory.

        Raises:
            InputError: If there is no such snapshot.
            RestoreError: As for `load`.
        """
        with self._processes.together(_LOADING):
            self._require_known(number)
            self._part.prove(number, self._kept[number])

    def tensors(self, number: SnapshotId | int) -> KeptTensors:
        """This rank's tensors of a snapshot, read one by one, each proven; waits for no other rank.

        Raises:
            InputError: If there is no such snapshot.
            RestoreError: If its manifest on this rank is damaged.
        """
        self._require_known(number)
        return self._part.tensors(number, self._kept[number])

    def _require_known(self, number: SnapshotId | int) -> None:
        if number not in self._kept:
            raise InputError(f"{self.path} has no snapshot {number}; it has {_listed(self.ids)}")

    def remove(self, number: SnapshotId | int) -> None:
        """Remove one snapshot, on all ranks: a run that starts again does not find it.

        Raises:
            InputError: If there is no such snapshot, or it is the only one.
            SnapshotError: If a file cannot be removed; a later save tries again.
        """
        with self._processes.together(_PRUNING):
            self._require_lock()
            self._require_known(number)
            if len(self._kept) == 1:
                raise InputError(f"snapshot {number} is the only one in {self.path}: it is not removed")
        del self._kept[number]
        self._sweep(_PRUNING)

    def prune(self) -> tuple[SnapshotId, ...]:
        """Remove the oldest snapshots beyond `keep` and `budget`, and files that no snapshot needs.

        Returns:
            The removed ones.

        Raises:
            SnapshotError: If a file cannot be removed; a later call tries again.
        """
        with self._processes.together(_PRUNING):
            self._require_lock()
        doomed = self._doomed()
        for number in doomed:
            del self._kept[number]
        self._sweep(_PRUNING)
        return doomed

    def close(self) -> None:
        """Free the lock. Waits for nobody; the snapshots stay."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    # ---------------------------------------------------------------- opening

    def _take_lock(self) -> None:
        folder = self._lock_path.parent
        try:
            make_folders(folder, self._files)
        except OSError as error:
            raise SnapshotError(f"cannot use {folder} for snapshots: {reason_of(error)}") from error
        self._lock = lock_folder(folder)
        if self._processes.is_main:
            self._require_same_size()

    def _require_same_size(self) -> None:
        """Shards of a run with another number of processes cannot be loaded, and must not be ignored."""
        ours = self._part.home.name
        found = sorted(path.parts[-3] for path in self.path.glob("rank-0000-of-*/snapshots/*.json"))
        foreign = [name for name in found if name != ours]
        if foreign:
            raise SnapshotError(
                f"{self.path} holds snapshots of a run with {int(foreign[0].rpartition('-')[2])} processes, this one "
                f"has {self._processes.size}: start as many as before, or choose another folder"
            )

    def _recover(self) -> Opened:
        rank = self._processes.rank
        with self._processes.together(_OPENING):
            found = self._part.manifests()
        committed = self._processes.broadcast(
            _OPENING, {number: None if manifest is None else manifest.others for number, manifest in found.items()}
        )
        self._next = 1 + max(max(numbers, default=0) for numbers in self._processes.gather(_OPENING, list(found)))
        for number, digests in committed.items():
            manifest = found.get(number)
            is_other = bool(manifest and digests and digests[rank] and digests[rank] != manifest.digest)
            self._kept[number] = None if is_other else manifest
        removed = self._sweep(_OPENING)
        damaged = tuple(number for number in self.ids if self._kept[number] is None)
        newest = self._kept[self.ids[-1]] if self.ids else None
        opened = Opened(self.ids, None if newest is None else newest.step, removed, damaged)
        self._say(opened)
        return opened

    def _say(self, opened: Opened) -> None:
        newest = f"the newest snapshot is {self.ids[-1]} (step {opened.step})" if self.ids else "it has no snapshot"
        if opened.removed:
            count = len(opened.removed)
            logger.warning("%s: removed %d files that an interrupted save left; %s", self.path, count, newest)
        elif self.ids:
            logger.info("%s: %s", self.path, newest)

    # ---------------------------------------------------------------- saving

    def _require_within_budget(self, manifest: Manifest) -> None:
        if self.budget is not None:
            needed = sum(self._processes.gather(_SAVING, manifest.nbytes))
            if needed > self.budget:
                raise SnapshotError(
                    f"a snapshot of {readable(needed)} is larger than the budget of {readable(self.budget)} for "
                    f"{self.path}: raise the budget; the snapshots saved before are kept"
                )

    def _stage(self, plan: Plan) -> list[str]:
        """Write the objects and, on every rank but 0, the manifest; gives the digests of the manifests by rank."""
        try:
            with self._processes.together(_SAVING):
                self._part.write_objects(plan)
                if not self._processes.is_main:
                    self._part.write_manifest(plan.manifest)
            return self._processes.gather(_SAVING, plan.manifest.digest)
        except BaseException:
            self._part.withdraw(plan, self._sound())
            raise

    def _commit(self, plan: Plan, digests: Sequence[str]) -> Manifest:
        manifest = plan.manifest
        if self._processes.is_main:
            manifest = replace(manifest, others=("", *digests[1:]))
        try:
            with self._processes.together(_SAVING):
                if self._processes.is_main:
                    self._part.write_manifest(manifest)
        except BaseException:
            # If rank 0's manifest cannot be removed either, it may count after a crash: it needs its parts.
            if self._processes.is_main:
                self._part.withdraw(plan, self._sound(), with_objects=self._processes.size == 1)
            raise
        return manifest

    # ---------------------------------------------------------------- removing

    def _doomed(self) -> tuple[SnapshotId, ...]:
        newest_first = self.ids[::-1]
        count = min(self.keep, len(newest_first))
        if self.budget is not None:
            totals = [sum(ranks) for ranks in zip(*self._processes.gather(_PRUNING, self._totals()), strict=True)]
            count = min(count, max(1, sum(total <= self.budget for total in totals)))
        return newest_first[count:][::-1]

    def _totals(self) -> list[int]:
        """Bytes of the files that the newest one, two, ... snapshots need together."""
        files: dict[str, int] = {}
        totals: list[int] = []
        for number in self.ids[::-1]:
            manifest = self._kept[number]
            files |= {object_name(held): file_size(held) for held in (() if manifest is None else manifest.objects)}
            totals.append(sum(files.values()))
        return totals

    def _sweep(self, operation: str) -> tuple[str, ...]:
        """Remove what no kept snapshot needs: rank 0's manifests, then the others', then objects."""
        removed: list[str] = []
        for turn in (True, False):
            with self._processes.together(operation):
                if self._processes.is_main is turn:
                    removed += self._part.remove_manifests_except(self._kept)
        with self._processes.together(operation):
            if len(self._sound()) == len(self._kept):  # else nobody knows which objects the damaged one needs
                removed += self._part.remove_objects_except(self._sound())
        return tuple(removed)

    def _sound(self) -> list[Manifest]:
        return [manifest for manifest in self._kept.values() if manifest is not None]

    def _require_lock(self) -> None:
        if self._lock is None or self._lock.handle is None:
            raise SnapshotError(f"{self.path} was closed, or is used in a forked process: open it again")
        if not self._lock.is_of(self._lock_path):
            raise SnapshotError(
                f"{self.path} was removed or replaced while the run used it, and the snapshots in it are gone: "
                "open it again to go on saving"
            )


def _rank_folder(rank: int, size: int) -> str:
    return f"rank-{rank:04d}-of-{size:04d}"


def _listed(ids: Sequence[int]) -> str:
    return f"snapshots {', '.join(map(str, ids))}" if ids else "no snapshot"
