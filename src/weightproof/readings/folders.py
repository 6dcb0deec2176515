"""Read a model folder as a session reads a model: tensor by tensor, never the whole of it.

Names, shapes, digests and spectra are those of the model in memory. What files do not tell (module classes, ties,
buffers that are computed when a model is built) is listed in `Readings.unmeasured` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from weightproof.collective import Processes
from weightproof.families import family_of
from weightproof.folders.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from weightproof.folders.file_digests import file_digests
from weightproof.probes import State, state_of, with_circuits
from weightproof.readings.circuits import Kept, Vector, read_circuits
from weightproof.readings.tensors import count_nonfinite
from weightproof.snapshots.tensor_store import digest_of_leaves, leaf_digests
from weightproof.types import CircuitReading, Readings, StructureReading, TensorReading

UNKNOWN_TO_FILES: Mapping[str, str] = {
    "module_classes": "files hold tensors, not modules: load the model to read its classes",
    "ties": "a tied tensor is stored once, and files do not say under which other names: load the model to read them",
    "computed_buffers": "buffers that a model computes when it is built are not in its files",
}
"""What a folder cannot tell, and why; by name, as in `Readings.unmeasured`."""

# A linear map that projects embeddings has the family of an embedding, and no rows for tokens.
_PROJECTION = re.compile(r".*proj\w*\.weight")


class FolderReadings(NamedTuple):
    """What is read of a model folder.

    Attributes:
        readings: Of every tensor and matrix.
        files: SHA-256 by relative path.
        tensors: Digest of every tensor by its name in memory (`tensor_store.tensor_digest`).
    """

    readings: Readings
    files: Mapping[str, str]
    tensors: Mapping[str, str]


def tensor_reading(stored: StoredTensor) -> TensorReading:
    """Exact facts about one tensor, as of the same tensor in memory; its blocks are read once, one at a time."""
    leaves: list[bytes] = []
    num_nonfinite = num_nan = 0
    for block in stored.blocks():
        leaves.append(leaf_digests(block))
        broken = count_nonfinite(block)
        num_nonfinite += broken
        num_nan += int(torch.isnan(block).sum()) if broken else 0
    return TensorReading(
        name=stored.name,
        dtype=str(stored.dtype).removeprefix("torch."),
        shape=stored.shape,
        storage="Tensor" if stored.is_buffer else "Parameter",
        is_buffer=stored.is_buffer,
        num_nonfinite=num_nonfinite,
        digest=digest_of_leaves(stored.dtype, stored.shape, b"".join(leaves)),
        num_nan=num_nan,
    )


def tensor_readings(checkpoint: Checkpoint, *, progress: bool = False) -> dict[str, TensorReading]:
    """Exact facts about every tensor of a folder, in one read of its files."""
    hidden = None if progress else True  # None: shown where somebody watches a terminal
    with tqdm(checkpoint.tensors, desc="tensors", unit="tensor", disable=hidden, leave=False, delay=1.0) as bar:
        return {stored.name: tensor_reading(stored) for stored in bar}


def structure_of(checkpoint: Checkpoint) -> StructureReading:
    """What files tell of the structure: sizes of embedding tables; module classes and ties are not in them."""
    tables = [
        stored
        for stored in checkpoint.tensors
        if len(stored.shape) == 2 and family_of(stored.name) == "embed" and not _PROJECTION.fullmatch(stored.name)
    ]
    sizes = {stored.name.removesuffix(".weight"): stored.shape[0] for stored in tables}
    return StructureReading(modules={}, ties=frozenset(), embedding_sizes=sizes)


def with_unknowns(state: State) -> State:
    """The state of a folder with what folders cannot tell, by name."""
    readings = state.readings
    unmeasured = {**readings.unmeasured, **UNKNOWN_TO_FILES}
    return State(replace(readings, unmeasured=unmeasured), state.fits)


def read_state_of(checkpoint: Checkpoint, *, progress: bool = False) -> State:
    """Everything that can be read of a folder, with exact spectra: what a session reads as its baseline."""
    tensors = tensor_readings(checkpoint, progress=progress)
    alone = Processes.alone()
    state = state_of(checkpoint.matrices, tensors, structure_of(checkpoint), alone, progress=progress)
    return with_unknowns(with_circuits(state, circuits_of(checkpoint)))


def circuits_of(checkpoint: Checkpoint, kept: Kept | None = None) -> dict[str, CircuitReading]:
    """The circuits of a folder; `kept` gives the readings that still hold."""
    vectors = {
        stored.name: Vector(stored.shape[0], partial(_vector, stored))
        for stored in checkpoint.tensors
        if len(stored.shape) == 1 and not stored.is_buffer
    }
    return read_circuits(checkpoint.matrices, vectors, checkpoint.config, Processes.alone(), kept)


def _vector(stored: StoredTensor) -> torch.Tensor:
    return next(stored.blocks())


def read_folder(folder: Path | str, *, progress: bool = False) -> FolderReadings:
    """Read every tensor and matrix of a model folder, with exact spectra.

    Args:
        folder: Model folder: config.json and safetensors files.
        progress: Show bars where somebody watches a terminal.

    Raises:
        InputError: If the folder is missing, torn, unsafe, or holds pickles.
    """
    checkpoint = open_checkpoint(Path(folder))
    files = file_digests(checkpoint.folder)
    readings = read_state_of(checkpoint, progress=progress).readings
    return FolderReadings(readings, files, digests_of(readings))


def digests_of(readings: Readings) -> dict[str, str]:
    """Digest of every tensor by name."""
    return {name: reading.digest for name, reading in readings.tensors.items()}
