"""Copies of tensors kept in memory or in a folder, and the digests that prove them.

A digest covers dtype, shape and the bytes in row-major order, so NaN payloads and the sign of zero
count, and memory layout does not. It is a digest of the digests of rows: whoever holds a row can hash
it where it lies, and a tensor has the same digest however it is sharded.

A folder holds one safetensors file and a manifest of digests that is written last; both appear by
rename after fsync, so a reader finds all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weightproof.errors import RestoreError, SnapshotError, WeightproofError
from weightproof.folders.files import is_out_of_space, sync_folder, write_atomically
from weightproof.folders.scratch_folders import claim_folder
from weightproof.parallel.shards import whole_here
from weightproof.snapshots.store_lock import HeldLock

TENSORS_FILE = "tensors.safetensors"
MANIFEST_FILE = "manifest.json"

# hashlib releases the GIL; one thread is left for everything else on the smallest machines.
HASH_THREADS = 2
# Room for the header and the manifest beside the tensors.
_SPARE_BYTES = 1 << 20
# What does not lie in host memory row after row is copied in pieces of this size to be hashed.
_COPIED_BYTES = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) over dtype and shape, then the SHA-256 of each leaf in row-major order.

    A leaf is `tensor[i]` where there are two or more dimensions, else the whole tensor.

    Raises:
        InputError: If it is sharded (see `weightproof.digests`).
    """
    return digest_of_leaves(tensor.dtype, tensor.shape, leaf_digests(whole_here(tensor)))


def digest_of_leaves(dtype: torch.dtype, shape: Iterable[int], leaves: bytes) -> str:
    """The digest (hex) of a tensor from those of its leaves, 32 bytes each."""
    found = hashlib.sha256(f"{str(dtype).removeprefix('torch.')}{list(shape)}".encode())
    found.update(leaves)
    return found.hexdigest()


def leaf_digests(tensor: torch.Tensor) -> bytes:
    """SHA-256 of the row-major bytes of each leaf of a plain tensor, 32 bytes each, one after the other."""
    if tensor.ndim < 2:
        return hashlib.sha256(raw_bytes(tensor)).digest()
    in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
    rows = max(1, tensor.shape[0] if in_place else _COPIED_BYTES * tensor.shape[0] // max(tensor.nbytes, 1))
    return b"".join(_row_digests(part) for part in tensor.split(rows))


def _row_digests(tensor: torch.Tensor) -> bytes:
    raw, sha256 = raw_bytes(tensor), hashlib.sha256
    step = len(raw) // max(tensor.shape[0], 1)
    return b"".join([sha256(raw[row * step : (row + 1) * step]).digest() for row in range(tensor.shape[0])])


def raw_bytes(tensor: torch.Tensor) -> bytes | memoryview:
    """The row-major bytes of a plain tensor; its own memory where it lies so on the CPU."""
    if tensor.numel() == 0:  # has strides that cannot be viewed as bytes
        return b""
    return as_bits(tensor.detach().cpu().contiguous()).reshape(-1).view(torch.uint8).numpy().data


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """`tensor_digest` of each, hashed by a few threads."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))


def model_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over tensor names and digests; the order of the mapping does not matter."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}={digests[name]}\n".encode())
    return whole.hexdigest()


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width (complex128: two integers per element)."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaN equals NaN, 0.0 differs from -0.0)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(as_bits(first.detach()), as_bits(second.detach().to(first.device)))


class Store(Protocol):
    """Where the originals are kept."""

    nbytes: int

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest of every tensor as it was when it was stored."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor; do not write to it."""
        ...

    def discard(self) -> None:
        """Free the memory or remove the files."""
        ...


class MemoryStore:
    """Clones, each on the device of its original.

    Raises:
        SnapshotError: If there is no memory for the copies.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        try:
            self._kept = {name: _clone(tensor) for name, tensor in tensors.items()}
        except (RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"no memory for a snapshot of {readable(self.nbytes)}: keep snapshots on disk instead "
                f"(a snapshot folder), or free memory; the model is untouched ({str(error).splitlines()[0]})"
            ) from error
        self._digests: dict[str, str] | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """Computed from the copies when first asked for."""
        if self._digests is None:
            self._digests = tensor_digests(self._kept)
        return self._digests

    def read(self, name: str) -> torch.Tensor:
        """The copy itself."""
        return self._kept[name]

    def discard(self) -> None:
        """Drop the copies."""
        self._kept = {}


class FolderStore:
    """One safetensors file with a manifest, in a fresh sub-folder of `directory`.

    Raises:
        SnapshotError: If the folder cannot be written or has no room; nothing is left behind.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(directory).free
        except OSError as error:
            raise SnapshotError(f"cannot use {directory} for snapshots: {error.strerror or error}") from error
        if free < self.nbytes + _SPARE_BYTES:
            raise SnapshotError(_no_room(directory, self.nbytes + _SPARE_BYTES, f"{readable(free)} are free"))
        self.folder, lock = claim_folder(directory)
        # Gigabytes must not stay behind when a session ends without discarding its snapshots.
        self._remove = weakref.finalize(self, _remove_folder, self.folder, os.getpid(), lock)
        # The experts of one stacked tensor are asked for one after the other.
        self._last_read: tuple[str, torch.Tensor] | None = None
        try:
            self.digests: Mapping[str, str] = tensor_digests(tensors)
            self._write(tensors)
        except (OSError, SafetensorError, WeightproofError, RuntimeError, KeyError, ValueError) as error:
            self.discard()
            if is_out_of_space(error):
                raise SnapshotError(_no_room(directory, self.nbytes, "the disk filled up while writing")) from error
            raise SnapshotError(f"cannot write a snapshot to {directory}: {error}; the model is untouched") from error
        except BaseException:
            self.discard()
            raise

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        path = self.folder / TENSORS_FILE
        temporary = path.with_suffix(".part")
        save_file({name: _writable(tensor) for name, tensor in tensors.items()}, temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(self.folder)
        manifest = {"format": "weightproof-snapshot-v1", "tensors": dict(self.digests)}
        write_atomically(self.folder / MANIFEST_FILE, json.dumps(manifest, sort_keys=True).encode())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor back and check it against the digest taken when it was written.

        Raises:
            RestoreError: If the file is gone, torn, or holds other values.
        """
        if self._last_read is not None and self._last_read[0] == name:
            return self._last_read[1]
        path = self.folder / TENSORS_FILE
        try:
            with safe_open(path, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RestoreError(f"the snapshot file {path} cannot be read back ({name}): {error}") from error
        if tensor_digest(tensor) != self.digests[name]:
            raise RestoreError(f"the snapshot file {path} was altered after it was written: {name} has another digest")
        self._last_read = name, tensor
        return tensor

    def discard(self) -> None:
        """Remove the folder; this also happens when the store is collected or the process ends."""
        self._last_read = None
        self._remove()


def _remove_folder(folder: Path, owner: int, lock: HeldLock | None) -> None:
    """Remove a snapshot's folder, unless this is a forked child of the process that wrote it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()


def readable(count: int) -> str:
    """A number of bytes for people."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def dense_part(tensor: torch.Tensor) -> torch.Tensor:
    """A view with every memory location once: expanded dimensions (stride 0) cut to length 1."""
    for dim in _expanded_dims(tensor):
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _expanded_dims(tensor: torch.Tensor) -> Iterable[int]:
    return [dim for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if size > 1 > step]


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy, bit for bit."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    """Row-major on the CPU, in memory that no other tensor of the file shares."""
    plain = tensor.detach().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def _no_room(directory: Path, needed: int, found: str) -> str:
    return (
        f"no room for a snapshot in {directory}: {readable(needed)} are needed and {found}; free some space, choose "
        "another folder, or keep snapshots in memory. The model is untouched"
    )
