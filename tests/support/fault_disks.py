"""Disks that fail, die or forget, for whatever writes through a `FileSystem` of `weightproof.folders.files`.

- `FailingDisk`: one call, or every call from one on, raises an OSError.
- `DyingDisk`: the process dies at one call: nothing that it still tries reaches the disk.
- `ForgetfulDisk`: the machine loses power: what was not synced is lost, in part or whole, in any combination.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weightproof.errors import RestoreError
from weightproof.folders.files import FileSystem
from weightproof.snapshots.store import Saved, SnapshotFolder

CHANGES = ("make_folder", "create", "write", "sync", "rename", "unlink", "sync_folder")


class Killed(BaseException):
    """The process is dead: no handler of the library may write any more."""


class QuickDisk(FileSystem):
    """Does not wait for the disk: a killed process loses nothing by that, and lost power is simulated."""

    def sync(self, handle: int) -> None:
        """Nothing."""

    def sync_folder(self, folder: Path) -> None:
        """Nothing."""


QUICK = QuickDisk()


class WatchedDisk(QuickDisk):
    """Counts the changes, and asks `before` what to do at each."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, kind: str) -> None:
        """Called before each change; may raise."""

    def partial(self, handle: int, content: memoryview) -> None:
        """What of a write reaches the disk although `before` raised."""

    def _watched(self, kind: str, *arguments: Any) -> Any:
        self.calls.append(kind)
        try:
            self.before(kind)
        except BaseException:
            if kind == "write":
                self.partial(*arguments)
            raise
        return getattr(super(), kind)(*arguments)

    def make_folder(self, folder: Path) -> None:
        self._watched("make_folder", folder)

    def create(self, path: Path) -> int:
        return self._watched("create", path)

    def write(self, handle: int, content: memoryview) -> int:
        return self._watched("write", handle, content)

    def sync(self, handle: int) -> None:
        self._watched("sync", handle)

    def rename(self, source: Path, target: Path) -> None:
        self._watched("rename", source, target)

    def unlink(self, path: Path) -> None:
        self._watched("unlink", path)

    def sync_folder(self, folder: Path) -> None:
        self._watched("sync_folder", folder)


class FailingDisk(WatchedDisk):
    """Call number `at` (from 0) raises `number`; with `stays`, every call from then on but the removal of files."""

    def __init__(self, at: int, number: int, *, stays: bool = False) -> None:
        super().__init__()
        self.at, self.number, self.stays = at, number, stays

    def before(self, kind: str) -> None:
        now = len(self.calls) - 1
        if now == self.at or (self.stays and now > self.at and kind != "unlink"):
            raise OSError(self.number, os.strerror(self.number))

    def partial(self, handle: int, content: memoryview) -> None:
        os.write(handle, content[: len(content) // 2])


class DyingDisk(WatchedDisk):
    """The process dies at call number `at`, in the middle of it if it is a write; by SIGKILL if `really`."""

    def __init__(self, at: int, *, really: bool = False) -> None:
        super().__init__()
        self.at, self.really = at, really

    def before(self, kind: str) -> None:
        if len(self.calls) > self.at:
            if self.really and kind != "write":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed(kind)

    def partial(self, handle: int, content: memoryview) -> None:
        if len(self.calls) == self.at + 1:
            os.write(handle, content[: len(content) // 2])
        if self.really:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(eq=False)
class _File:
    """One file, whatever its name: its content when it was last synced (None: never), and now."""

    synced: bytes | None = None
    now: bytes = b""


@dataclass
class ForgetfulDisk(QuickDisk):
    """Writes through, and keeps beside it what a loss of power would leave.

    A name (of a file, or of a folder) is sure when its folder was synced after the last change to it, and content is
    sure when the file was synced. What is not sure may be there or not, each change by itself; content that is not
    sure may be old, empty, cut or whole.
    """

    root: Path
    sure: dict[Path, _File] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    pending: list[tuple[Path, str, tuple[Any, ...]]] = field(default_factory=list)
    names: dict[Path, _File] = field(default_factory=dict)
    handles: dict[int, _File] = field(default_factory=dict)
    dies_at: int | None = None
    calls: int = 0

    @classmethod
    def of(cls, root: Path) -> ForgetfulDisk:
        """A disk on which everything that lies there now is sure."""
        disk = cls(root)
        disk.folders = {root, *(path for path in root.rglob("*") if path.is_dir())}
        for path in root.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                disk.sure[path] = disk.names[path] = _File(content, content)
        return disk

    def _live(self) -> None:
        if self.dies_at is not None and self.calls >= self.dies_at:
            raise Killed
        self.calls += 1

    def make_folder(self, folder: Path) -> None:
        self._live()
        super().make_folder(folder)
        self.pending.append((folder.parent, "make", (folder,)))

    def create(self, path: Path) -> int:
        self._live()
        handle = super().create(path)
        self.handles[handle] = self.names[path] = _File()
        self.pending.append((path.parent, "name", (path, self.names[path])))
        return handle

    def write(self, handle: int, content: memoryview) -> int:
        self._live()
        count = super().write(handle, content)
        self.handles[handle].now += bytes(content[:count])
        return count

    def sync(self, handle: int) -> None:
        self._live()
        self.handles[handle].synced = self.handles[handle].now

    def close(self, handle: int) -> None:
        super().close(handle)
        del self.handles[handle]

    def rename(self, source: Path, target: Path) -> None:
        self._live()
        super().rename(source, target)
        self.names[target] = self.names.pop(source)
        self.pending.append((target.parent, "rename", (source, target, self.names[target])))

    def unlink(self, path: Path) -> None:
        self._live()
        super().unlink(path)
        self.names.pop(path, None)
        self.pending.append((path.parent, "unlink", (path,)))

    def sync_folder(self, folder: Path) -> None:
        self._live()
        for place, kind, arguments in self.pending:
            if place == folder:
                self._apply(self.sure, self.folders, kind, arguments)
        self.pending = [change for change in self.pending if change[0] != folder]

    @staticmethod
    def _apply(names: dict[Path, _File], folders: set[Path], kind: str, arguments: tuple[Any, ...]) -> None:
        if kind == "make":
            folders.add(arguments[0])
        elif kind == "unlink":
            names.pop(arguments[0], None)
        else:
            names[arguments[-2]] = arguments[-1]
            if kind == "rename":
                names.pop(arguments[0], None)

    def after_power_loss(self, target: Path, random_numbers: random.Random) -> Path:
        """Write into `target` one of the states that may be found when the machine is back."""
        names, folders = dict(self.sure), set(self.folders)
        share = random_numbers.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        for _, kind, arguments in self.pending:
            if random_numbers.random() < share:
                self._apply(names, folders, kind, arguments)
        target.mkdir(parents=True)
        for path, file in names.items():
            if all(parent in folders for parent in path.parents if parent.is_relative_to(self.root)):
                place = target / path.relative_to(self.root)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(self._content(file, random_numbers))
        return target

    @staticmethod
    def _content(file: _File, random_numbers: random.Random) -> bytes:
        if file.synced == file.now:
            return file.now
        cut = random_numbers.randrange(len(file.now) + 1)
        return random_numbers.choice((file.synced or b"", b"", file.now[:cut], bytes(len(file.now)), file.now))


# ---------------------------------------------------------------- a run and its snapshots


def tensors_at(step: int) -> dict[str, torch.Tensor]:
    """The state of a made-up run: two large tensors that move, one that does not, and small ones of both kinds."""
    generator = torch.Generator().manual_seed(step)
    return {
        "embedding": torch.arange(20000.0),
        "layers.0.weight": torch.randn(150, 130, generator=generator),
        "layers.1.weight": torch.randn(150, 130, generator=generator).bfloat16().repeat(2, 1),
        "layers.0.bias": torch.randn(7, generator=generator),
        "norm": torch.ones(16),
        "moments.0": torch.zeros(16),
        "moments.1": torch.zeros(16),
        "count": torch.tensor(step),
    }


def values_at(step: int) -> dict[str, Any]:
    """JSON of that run."""
    return {"seed": 2**70 + step, "rates": [0.1 * step, float("inf")], "name": "é", "nothing": None}


def save_steps(folder: SnapshotFolder, steps: Iterable[int]) -> None:
    """Save the state of the run at these steps."""
    for step in steps:
        folder.save(step, tensors_at(step), values_at(step))


def is_exact(saved: Saved) -> bool:
    """Whether a snapshot is, bit for bit, what the run saved at its step."""
    expected = tensors_at(saved.step)
    return saved.values == values_at(saved.step) and (
        saved.tensors.keys() == expected.keys()
        and all(torch.equal(saved.tensors[name], tensor) for name, tensor in expected.items())
        and all(saved.tensors[name].dtype == tensor.dtype for name, tensor in expected.items())
    )


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, by its relative name."""
    return {
        str(found.relative_to(path)): found.read_bytes()
        for found in sorted(path.rglob("*"))
        if found.is_file() and found.name != "lock"
    }


def after_restart(path: Path, *, keep: int = 2) -> int | None:
    """What a run finds that starts again: the step of the newest snapshot, after everything there was checked.

    Every snapshot must be exact, nothing may lie there that none of them needs, and saving must go on.
    """
    with SnapshotFolder(path, keep=keep, files=QUICK) as folder:
        for number in folder.ids:
            assert is_exact(folder.load(number)), f"snapshot {number} is not what was saved"
        newest = folder.latest()
    with SnapshotFolder(path, keep=keep, files=QUICK) as folder:
        assert folder.opened.removed == (), "opening left something behind"
        assert not [name for name in files_of(path) if name.endswith(".part")]
        assert folder.ids[-1:] == (() if newest is None else (newest.id,))
        folder.save(1000, tensors_at(1000), values_at(1000))
        found = folder.latest()
        assert found is not None
        assert is_exact(found)
        assert newest is None or found.id > newest.id
    return None if newest is None else newest.step


def copy_of(folder: Path, target: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


def flip(path: Path, bit: int) -> None:
    """Invert one bit of a file, in place."""
    with path.open("rb+") as handle:
        handle.seek(bit // 8)
        (old,) = handle.read(1)
        handle.seek(bit // 8)
        handle.write(bytes([old ^ (1 << bit % 8)]))


def snapshot_is_damaged(path: Path) -> bool:
    """Whether opening or loading finds damage."""
    with SnapshotFolder(path, keep=100, files=QUICK) as folder:
        if folder.opened.damaged:
            return True
        for number in folder.ids:
            try:
                folder.load(number)
            except RestoreError:
                return True
    return False


# What is wrong, as the error says it.
DISK_FAULTS = {"disk is full": errno.ENOSPC, "input/output error": errno.EIO, "read-only": errno.EROFS}
