"""A lock on a folder: while one process has it no other gets it, and the death of its holder frees it.

It is the operating system's advisory lock (`flock`) on a file that is never removed. What the file holds (process
id, host, start time) is for the message only; no decision reads it, so that a reused process id or a wrong clock
does no harm.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import weakref
from pathlib import Path

from weightproof.errors import SnapshotError
from weightproof.folders.files import reason_of

LOCK_FILE = "lock"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF)

# Handles of locks that this process holds. A forked child (a worker of a data loader) has copies of them,
# and would keep a lock after its parent's death.
_HELD: weakref.WeakSet[HeldLock] = weakref.WeakSet()


class LockTakenError(OSError):
    """Another process, or another part of this one, has the lock."""


class HeldLock:
    """A lock on an open file or folder, until `release` or the end of the process."""

    def __init__(self, handle: int) -> None:
        self.handle: int | None = handle
        _HELD.add(self)

    @classmethod
    def take(cls, path: Path, flags: int) -> HeldLock:
        """Open `path` and lock it, at once or not at all.

        Raises:
            LockTakenError: If it is locked.
            OSError: If it cannot be opened or, with one of the numbers of `has_no_locks`, has no locks.
        """
        try:
            import fcntl
        except ImportError as error:  # Windows
            raise OSError(errno.ENOTSUP, "this operating system has no flock") from error
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockTakenError(error.errno, "locked") from error
            raise
        return cls(handle)

    def is_of(self, path: Path) -> bool:
        """Whether `path` still is the file that was locked: not if it was removed, and perhaps made anew."""
        if self.handle is None:
            return False
        try:
            return os.path.samestat(path.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def release(self) -> None:
        """Free the lock; nothing if it is free. In a forked child the parent keeps it."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)


def _forget_in_child() -> None:
    for held in list(_HELD):
        held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def has_no_locks(error: OSError) -> bool:
    """Whether an error of `HeldLock.take` says that locks do not exist there."""
    return error.errno in _NO_LOCKS


def lock_folder(folder: Path) -> HeldLock:
    """Lock `folder`, which exists, by the file `lock` in it.

    Raises:
        SnapshotError: If another run has it (says which), if the folder cannot be written, or if its file
            system has no locks.
    """
    path = folder / LOCK_FILE
    try:
        held = HeldLock.take(path, os.O_RDWR | os.O_CREAT)
        try:
            _sign(held)
        except OSError:
            held.release()
            raise
    except LockTakenError as error:
        raise SnapshotError(
            f"{folder} is in use by another run ({_holder(path)}): end that run, or choose another folder for snapshots"
        ) from error
    except OSError as error:
        if has_no_locks(error):
            raise SnapshotError(
                f"the file system of {folder} has no locks (flock: {error.strerror or error}), so that two runs could "
                "overwrite each other's snapshots: choose a folder on another file system"
            ) from error
        raise SnapshotError(f"cannot use {folder} for snapshots: {reason_of(error)}") from error
    return held


def _sign(held: HeldLock) -> None:
    """Note who holds it, in place: the file must stay the one that is locked."""
    if held.handle is not None:
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode()
        os.ftruncate(held.handle, 0)
        os.pwrite(held.handle, note, 0)


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_bytes())
        return f"process {note['pid']} on {note['host']}, since {note['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it left no name"
