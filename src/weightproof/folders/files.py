"""Writing files so that a reader finds the old content or the new one, never a torn one.

Every change to a disk that must survive a crash goes through a `FileSystem`, one call for each change. A test that
breaks a call, kills the process at it, or forgets what was not yet synced hands in a `FileSystem` of its own.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from weightproof.errors import InputError

# One system call writes no more than this: Linux stops at 2 GiB, and a kill or a full disk is noticed sooner.
_PIECE_BYTES = 1 << 26


class FileSystem:
    """The calls by which files are written, each of them one change of the disk; all raise OSError."""

    def make_folder(self, folder: Path) -> None:
        """Create one folder whose parent exists; nothing if it is there."""
        folder.mkdir(exist_ok=True)

    def create(self, path: Path) -> int:
        """Open a file for writing, empty; gives its handle."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, handle: int, content: memoryview) -> int:
        """Append; gives how many bytes were written, which may be fewer than there are."""
        return os.write(handle, content)

    def sync(self, handle: int) -> None:
        """Make the content of a file durable, not yet its name."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Give a handle back."""
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name in one step, in place of what had that name."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; nothing if it is gone."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable (POSIX: fsync of the directory)."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, path: Path) -> bytearray:
        """The whole content of a file."""
        content = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as handle:
            view, filled = memoryview(content), 0
            while filled < len(content) and (count := handle.readinto(view[filled : filled + _PIECE_BYTES])):
                filled += count
        if filled < len(content):
            raise OSError(errno.EIO, "the file became shorter while it was read")
        return content

    def free_bytes(self, folder: Path) -> int:
        """Room left for files of this user."""
        return shutil.disk_usage(folder).free


DISK = FileSystem()


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable (POSIX: fsync of the directory)."""
    DISK.sync_folder(folder)


def replace_file(path: Path, pieces: Iterable[bytes | memoryview], files: FileSystem = DISK) -> None:
    """Write a temporary file beside `path`, fsync it and rename it to `path`; the folder is not yet synced.

    Raises:
        OSError: If that failed; the old content of `path`, if any, is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        handle = files.create(temporary)
        try:
            for piece in pieces:
                _write_all(files, handle, memoryview(piece).cast("B"))
            files.sync(handle)
        finally:
            files.close(handle)
        files.rename(temporary, path)
    except OSError:
        remove_quietly([temporary], files)
        raise


def _write_all(files: FileSystem, handle: int, content: memoryview) -> None:
    while len(content):
        content = content[files.write(handle, content[:_PIECE_BYTES]) :]


def make_folders(folder: Path, files: FileSystem = DISK) -> None:
    """Create a folder and those above it that are missing, durably.

    Raises:
        OSError: If that failed.
    """
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    for each in reversed(missing):
        files.make_folder(each)
        files.sync_folder(each.parent)


def remove_quietly(paths: Iterable[Path], files: FileSystem = DISK) -> bool:
    """Remove files after a failure whose error is what the user must read; whether all of them are gone."""
    gone = True
    for path in paths:
        try:
            files.unlink(path)
        except OSError:
            gone = False
    return gone


def write_atomically(path: Path, content: bytes, files: FileSystem = DISK) -> None:
    """Replace `path` by `content`: temporary file, fsync, rename, fsync of the folder.

    Raises:
        InputError: If the folder cannot be created or written; the old file is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [content], files)
        files.sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; the old content, if any, is kept") from error


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is a full disk or a used up quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(error):
            return True
        error = error.__cause__
    return False


def reason_of(error: OSError) -> str:
    """What a disk refused, in words for people."""
    if is_out_of_space(error):
        return "the disk is full"
    words = {
        errno.EROFS: "the file system is read-only",
        errno.EIO: "the disk reported an input/output error",
        errno.ENOENT: "the folder or a file in it is gone",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EACCES: "this user may not write there",
        errno.EPERM: "this user may not write there",
    }
    return words.get(error.errno or 0, error.strerror or str(error))
