"""Digests of a model folder: of every file, and of every tensor however it is sharded.

Every regular file counts, hidden ones and those in sub-folders too. Nothing is unpickled or executed, files are read
in pieces and tensors one at a time. A link that leads out of the folder, a linked folder, a pipe: refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from weightproof.errors import InputError
from weightproof.folders.checkpoint_files import check_folder, require_regular
from weightproof.folders.checkpoints import StoredTensor, open_checkpoint
from weightproof.snapshots.tensor_store import digest_of_leaves, leaf_digests

OWN_FILES = ("certificate.json", "report.html", "report.md", "README.md")
"""Files at the top of a folder that `certify` and `report` write there: about the model, not part of it.

A model card that quotes a certificate's digest cannot have its own digest in that certificate.
"""
WEIGHT_FILES = (".safetensors", ".safetensors.index.json")
"""How the names of the files end that say where a tensor is stored."""


def file_digests(folder: Path | str, skip: Collection[Path] = ()) -> dict[str, str]:
    """SHA-256 (hex) of every file of a folder, by relative path with `/`.

    Args:
        folder: A model folder. `OWN_FILES` at its top are left out.
        skip: Other files to leave out, such as the certificate that is being verified.

    Raises:
        InputError: If the folder is missing, holds what is no regular file, or leads out of itself.
    """
    folder = Path(folder)
    left_out = {path.resolve() for path in skip}
    found: dict[str, str] = {}
    for path in files_of(folder):
        name = path.relative_to(folder).as_posix()
        if name not in OWN_FILES and path.resolve() not in left_out:
            found[name] = _sha256(path)
    return found


def left_out(folder: Path | str, skip: Collection[Path] = ()) -> list[str]:
    """Relative paths of the files that `file_digests` leaves out."""
    folder = Path(folder)
    own = {(folder / name).resolve() for name in OWN_FILES} | {path.resolve() for path in skip}
    return [path.relative_to(folder).as_posix() for path in files_of(folder) if path.resolve() in own]


def files_of(folder: Path) -> Iterator[Path]:
    """Every file of a folder in order of its path, each proven to be a regular file of this folder."""
    check_folder(folder)
    return _below(folder, folder)


def _below(top: Path, folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _below(top, path)
        else:
            yield _regular(top, path)


def _regular(top: Path, path: Path) -> Path:
    require_regular(top, path)
    if not path.exists():
        raise InputError(f"{path} is a link to nothing; remove it or download the model again")
    return path


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def tensor_digests(folder: Path | str) -> dict[str, str]:
    """Digest (`tensor_store.tensor_digest`) of every tensor of a folder by its name in memory; of no value twice.

    The same however the tensors are sharded and in whatever order they are stored.

    Raises:
        InputError: If the folder is missing, torn, unsafe, or holds pickles instead of safetensors.
    """
    return {stored.name: _digest(stored) for stored in open_checkpoint(Path(folder)).tensors}


def _digest(stored: StoredTensor) -> str:
    leaves = b"".join(leaf_digests(block) for block in stored.blocks())
    return digest_of_leaves(stored.dtype, stored.shape, leaves)
