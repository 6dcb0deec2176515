"""Directions that a user keeps: named ones of the residual stream, or a stored change, to compare a change with.

Two kinds of file. A safetensors file of directions: name -> (d,) or (k, d), each set spanning a subspace of the stream
of width d; a name that begins with that of a block (`model.layers.3.refusal`) is for that block alone. Or whatever
`Delta.load` reads: a stored change, compared matrix by matrix.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightproof.deltas import Delta
from weightproof.errors import InputError
from weightproof.families import writes_to_stream
from weightproof.numerics.intruders import matrix_cosine, written_cosine
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.subspace import orthonormal
from weightproof.types import StoredCosine


@dataclass(frozen=True, eq=False)
class StoredDirections:
    """Directions to compare changes with.

    Attributes:
        bases: Name -> orthonormal (d, k).
        delta: A stored change, or None.
        digest: SHA-256 over all of it.
    """

    bases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    delta: Delta | None = None
    digest: str = ""

    @classmethod
    def load(cls, path: Path | str) -> StoredDirections:
        """Read a file of directions, or a stored change.

        Raises:
            InputError: There is no such file, it is torn, or it holds something that is no direction.
        """
        file = Path(path)
        found = None if file.is_dir() else _tensors(file)
        if found is None:
            delta = Delta.load(file)
            return cls({}, delta, delta.digest)
        whole = hashlib.sha256()
        bases: dict[str, Tensor] = {}
        for name, tensor in sorted(found.items()):
            whole.update(f"{name} {tensor_digest(tensor)}\n".encode())
            bases[name] = _basis(file, name, tensor)
        return cls(bases, None, whole.hexdigest())

    def names(self) -> frozenset[str]:
        """Everything that can be compared with."""
        return frozenset(self.bases) | (frozenset() if self.delta is None else frozenset(self.delta.parts))

    def applies_to(self, name: str, d_out: int) -> tuple[str, ...]:
        """Which of them a change of this matrix is compared with."""
        if self.delta is not None:
            return (name,) if name in self.delta.parts else ()
        if not writes_to_stream(name):
            return ()
        fitting = (key for key, basis in self.bases.items() if basis.shape[0] == d_out)
        return tuple(key for key in fitting if _is_for(key, name))

    def cosines(self, name: str, change: Tensor) -> tuple[StoredCosine, ...]:
        """How far the change (d_out, d_in) of a matrix writes into each of them."""
        if self.delta is not None:
            stored = self.delta.dense(name) if name in self.delta.parts else None
            if stored is None or stored.shape != change.shape:
                return ()
            return (StoredCosine(name, matrix_cosine(change, stored), 1.0 / math.sqrt(change.numel())),)
        return tuple(
            StoredCosine(
                key,
                written_cosine(change, self.bases[key]),
                math.sqrt(self.bases[key].shape[1] / change.shape[0]),
            )
            for key in self.applies_to(name, change.shape[0])
        )


def _tensors(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a plain safetensors file; None for one that a delta wrote."""
    try:
        with safe_open(file, framework="pt") as handle:
            if "weightproof.delta" in (handle.metadata() or {}):
                return None
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the stored directions {file} cannot be read ({error}): give a safetensors file of named directions of "
            "the residual stream, or a delta"
        ) from error


def _basis(file: Path, name: str, tensor: Tensor) -> Tensor:
    rows = tensor if tensor.ndim == 2 else tensor[None]
    if tensor.ndim not in (1, 2) or not tensor.is_floating_point() or not bool(rows.isfinite().all()):
        raise InputError(f"{file}: {name!r} is no direction: it must be (width,) or (k, width), of finite numbers")
    basis = orthonormal(rows.T)
    if basis.shape[1] == 0:
        raise InputError(f"{file}: {name!r} is zero: it points nowhere")
    return basis


def _is_for(key: str, matrix: str) -> bool:
    """Whether a direction is for every block, or for the one that this matrix is in."""
    parts = key.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return not numbers or matrix.startswith(".".join(parts[: numbers[-1] + 1]) + ".")
