"""Folders that live as long as their process: claimed by a lock, and swept by others when that process was killed.

A folder is locked before it gets its name, so whoever finds it under that name and can lock it knows that its owner
is gone. Where the file system has no locks nothing is swept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import torch.distributed as dist

from weightproof.errors import SnapshotError
from weightproof.folders.files import reason_of
from weightproof.snapshots.store_lock import HeldLock, has_no_locks

logger = logging.getLogger("weightproof")

# Locks of some network file systems reach no other host: only this host's folders can be known to be dead.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_NAME = re.compile(rf"snapshot-(rank\d+-)?{_HOST}-\w{{8}}")


def claim_folder(directory: Path) -> tuple[Path, HeldLock | None]:
    """Sweep what killed processes left in `directory`, and make a fresh folder of this process's own.

    Returns:
        The folder, and the lock to release once it is removed; None where the file system has no locks.

    Raises:
        SnapshotError: If the folder cannot be made.
    """
    try:
        sweep(directory)
        unnamed = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
        try:
            lock = HeldLock.take(unnamed, os.O_RDONLY)
        except OSError as error:
            if not has_no_locks(error):
                raise
            lock = None
        suffix = unnamed.name.removeprefix(".new-")
        return unnamed.rename(directory / f"snapshot-{_rank()}{_HOST}-{suffix}"), lock
    except OSError as error:
        raise SnapshotError(f"cannot write to {directory}: {reason_of(error)}") from error


def sweep(directory: Path) -> tuple[Path, ...]:
    """Remove the folders whose owners on this host are gone; gives the removed ones.

    Raises:
        OSError: If `directory` cannot be read.
    """
    removed = [path for path in sorted(directory.iterdir()) if _NAME.fullmatch(path.name) and _remove_dead(path)]
    if removed:
        logger.warning("%s: removed %d snapshots that killed processes left", directory, len(removed))
    return tuple(removed)


def _remove_dead(folder: Path) -> bool:
    try:
        lock = HeldLock.take(folder, os.O_RDONLY)
    except OSError:  # its owner lives, it is gone by now, or there are no locks and nothing is known
        return False
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    return not folder.exists()


def _rank() -> str:
    """So that people know whose folder it is; that no two ranks share one is the operating system's promise."""
    return f"rank{dist.get_rank()}-" if dist.is_available() and dist.is_initialized() else ""
