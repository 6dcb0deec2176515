"""The folder of a recipe's results: made beside its place and renamed when all of it is there.

Whoever looks finds the results of a whole run, those of the run before, or nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightproof.errors import InputError
from weightproof.folders.files import reason_of, sync_folder
from weightproof.snapshots.store_lock import HeldLock, LockTakenError, has_no_locks

SUMMARY = "summary.json"
RECIPE = "recipe.yaml"


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `out` when the block ends well, and is removed when it does not.

    Args:
        out: A new folder, an empty one, or that of an earlier run, which is replaced.

    Raises:
        InputError: If `out` holds something else, cannot be written, or another run writes to it.
    """
    out = out.absolute()
    check_place(out)
    scratch = out.with_name(f".{out.name}.part")
    try:
        lock = _claimed(scratch)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {reason_of(error)}; choose another folder with --out") from error
    try:
        yield scratch
        _put_in_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            lock.release()


def check_place(out: Path) -> None:
    """Refuse a folder that no earlier run wrote, before anything long.

    Raises:
        InputError: Naming the folder and what to do.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a new folder with --out")
    if out.is_symlink():
        raise InputError(f"{out} is a link: name the folder itself with --out")
    if out.is_dir() and any(out.iterdir()) and not all((out / name).is_file() for name in (SUMMARY, RECIPE)):
        raise InputError(f"the folder {out} is not empty and no earlier run wrote it: choose another with --out")


def _claimed(scratch: Path) -> HeldLock | None:
    """Make the scratch folder this run's own; what a killed run left there is removed."""
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    lock = None
    try:
        lock = HeldLock.take(scratch, os.O_RDONLY)
    except LockTakenError as error:
        raise InputError(f"another run writes to {scratch.name[1:].removesuffix('.part')}: wait for it") from error
    except OSError as error:
        if not has_no_locks(error):
            raise
    for left in scratch.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    return lock


def _put_in_place(scratch: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists():
            out.rename(old)
        scratch.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise InputError(f"{out} cannot be written: {reason_of(error)}; choose another folder with --out") from error
    shutil.rmtree(old, ignore_errors=True)
