"""Safetensors files whose every byte follows from the digests of their tensors.

The header is written in one fixed form, tensors are called by their digests, and there is no other metadata. So a
reader who knows the digests knows the header and the size, hashes the rest, and finds any bit that was changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weightproof.errors import RestoreError, SnapshotError
from weightproof.folders.files import FileSystem, reason_of, replace_file
from weightproof.snapshots.tensor_store import raw_bytes, tensor_digest

# https://github.com/huggingface/safetensors: names of the dtypes that a file can hold.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of a tensor.

    Attributes:
        digest: SHA-256 (hex), `tensor_store.tensor_digest`.
        dtype: As safetensors names it.
        shape: Its dimensions.
    """

    digest: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, digest: str) -> StoredTensor:
        """Describe a plain tensor.

        Raises:
            SnapshotError: If safetensors cannot hold its dtype.
        """
        if tensor.dtype not in _NAMES:
            raise SnapshotError(f"{name} has dtype {tensor.dtype}, which no safetensors file holds: convert it first")
        return cls(digest, _NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize


def arranged(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The order in a file: wide elements first, so that each tensor is aligned to its own."""
    return sorted(tensors, key=lambda item: (-_DTYPES[item.dtype].itemsize, item.digest))


def object_name(tensors: Sequence[StoredTensor]) -> str:
    """The name of a file by what it holds: the digest of its tensor, or one over the digests of several."""
    digests = [item.digest for item in tensors]
    name = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return f"{name}.safetensors"


def file_size(tensors: Sequence[StoredTensor]) -> int:
    """Bytes of the whole file."""
    return len(_header(tensors)) + sum(item.nbytes for item in tensors)


def write_tensor_file(
    path: Path, tensors: Sequence[StoredTensor], values: Iterable[torch.Tensor], files: FileSystem
) -> None:
    """Write a file (temporary file, fsync, rename); the folder is not yet synced.

    Raises:
        OSError: If that failed.
    """

    def pieces() -> Iterator[bytes | memoryview]:
        yield _header(tensors)
        for value in values:
            yield raw_bytes(value)

    replace_file(path, pieces(), files)


def read_tensor_file(path: Path, tensors: Sequence[StoredTensor], files: FileSystem) -> list[torch.Tensor]:
    """Read a file and prove every byte of it; the tensors are on the CPU and share no memory with anything else.

    Raises:
        RestoreError: If the file is gone, cannot be read, or is not, bit for bit, the one that was written.
    """
    try:
        content = files.read(path)
    except OSError as error:
        raise RestoreError(f"the snapshot file {path} cannot be read: {reason_of(error)}") from error
    header = _header(tensors)
    if len(content) != file_size(tensors) or content[: len(header)] != header:
        raise RestoreError(f"the snapshot file {path} was altered or cut after it was written: its header differs")
    found, offset = [], len(header)
    for item in tensors:
        tensor = _view(content, offset, item)
        if tensor_digest(tensor) != item.digest:
            raise RestoreError(f"the snapshot file {path} was altered after it was written: its values differ")
        found.append(tensor if len(tensors) == 1 else tensor.clone())
        offset += item.nbytes
    return found


def _view(content: bytearray, offset: int, item: StoredTensor) -> torch.Tensor:
    dtype, count = _DTYPES[item.dtype], torch.Size(item.shape).numel()
    if count == 0:
        return torch.empty(item.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).view(item.shape)


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    """Length and JSON, padded so that the values begin at a multiple of 8."""
    entries, offset = {}, 0
    for item in tensors:
        entries[item.digest] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
