"""Passes over batches: each batch read by one process, the readings of all on every process, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from weightproof.activations import undisturbed
from weightproof.collective import Processes
from weightproof.diagnostics.ablation import VARIANTS, without_block
from weightproof.diagnostics.capture import Batch, Capture, Trace, read_batch, read_trace
from weightproof.diagnostics.depth import DepthReading, depth_from_sums
from weightproof.diagnostics.judging import Levels
from weightproof.diagnostics.objective import LossOf
from weightproof.diagnostics.readings import BatchReading, PointReading
from weightproof.diagnostics.report import Layers
from weightproof.diagnostics.trunks import Trunk
from weightproof.errors import InputError
from weightproof.parallel.placements import is_dtensor, is_zero3

__all__ = ["depth_of", "levels_of", "read_model", "read_traces"]

R = TypeVar("R")


def read_model(
    model: nn.Module, batches: Sequence[Batch], trunks: tuple[Trunk, ...], loss_of: LossOf, processes: Processes
) -> list[BatchReading]:
    """Every batch, forward and back.

    Raises:
        InputError: If a pass fails on any process, or different blocks run in different batches.
    """
    capture = Capture(trunks)

    def read(number: int) -> BatchReading:
        with torch.enable_grad():
            return read_batch(capture, model, batches[number], loss_of, number)

    with capture.hooks():
        found = _shared(model, len(batches), processes, "training health", read)
    return _alike(found)


def read_traces(
    trace_of: Callable[[Batch], Trace], batches: Sequence[Batch], reduction: str | None, processes: Processes
) -> list[BatchReading]:
    """Every batch, passed by the caller's own function.

    Raises:
        InputError: If a trace does not fit together.
    """

    def read(number: int) -> BatchReading:
        trace = trace_of(batches[number])
        if not isinstance(trace, Trace):
            raise InputError(f"the function to diagnose returned {type(trace).__name__}: return a health.Trace")
        return read_trace(trace, reduction)

    own = range(processes.rank, len(batches), processes.size)
    with processes.together("training health"):
        mine = {number: read(number) for number in own}
        shares = processes.gather("training health", mine)
    return _alike([shares[number % processes.size][number] for number in range(len(batches))])


def depth_of(  # noqa: PLR0913, PLR0917 - what `read_model` takes, and the variant
    model: nn.Module,
    batches: Sequence[Batch],
    trunks: tuple[Trunk, ...],
    loss_of: LossOf,
    processes: Processes,
    variant: str,
    seed: int,
) -> DepthReading:
    """Losses with every block against losses without each in turn, window by window.

    Raises:
        InputError: If the loss is known for whole batches only, or a block cannot be left out.
    """
    names, sums = [], []
    network = _row_losses(model, batches, loss_of, processes)
    for block in (block for trunk in trunks for block in trunk):
        with without_block(block, variant, seed):
            found = _row_losses(model, batches, loss_of, processes)
        names.append(block.name)
        sums.append(found[0])
    return depth_from_sums(network, sums, names, VARIANTS[variant])


def levels_of(batches: Sequence[BatchReading]) -> Levels:
    """Medians over all tokens of all batches."""
    columns = list(zip(*(batch.points for batch in batches), strict=True))
    return Levels(
        places=batches[0].places,
        norms=tuple(_median([point.norms for point in column]) for column in columns),
        maxima=tuple(_largest(column) for column in columns),
        gradients=tuple(
            _median([point.gradients for point in column if point.gradients is not None]) for column in columns
        ),
        underflow=_underflow(columns),
    )


def _row_losses(
    model: nn.Module, batches: Sequence[Batch], loss_of: LossOf, processes: Processes
) -> tuple[np.ndarray, np.ndarray]:
    def read(number: int) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            found = loss_of(model, batches[number], number)
        if found.rows is None or found.row_counts is None:
            raise InputError("depth utility pairs windows, and the loss is one number a batch: return one a sample")
        return found.rows.double().cpu().numpy(), found.row_counts.double().cpu().numpy()

    parts = _shared(model, len(batches), processes, "depth utility", read)
    sums, counts = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    return sums, counts


def _shared(model: nn.Module, count: int, processes: Processes, operation: str, read: Callable[[int], R]) -> list[R]:
    """What `read` gives for every batch, on every process.

    Batch i is read by process i mod P; where a pass is a series of all-gathers, all processes make every pass with
    the same inputs, and the first one's readings are taken.
    """
    sharded = any(is_dtensor(one) or is_zero3(one) for one in model.parameters())
    own = range(count) if sharded else range(processes.rank, count, processes.size)
    with processes.together(operation), undisturbed(model):
        mine = {number: read(number) for number in own}
        if sharded:
            found = processes.broadcast(operation, mine)
            return [found[number] for number in range(count)]
        shares = processes.gather(operation, mine)
    return [shares[number % processes.size][number] for number in range(count)]


def _alike(found: list[BatchReading]) -> list[BatchReading]:
    for batch in found[1:]:
        if batch.places != found[0].places:
            raise InputError("different blocks are run in different batches: name blocks that every batch runs through")
    return found


def _median(parts: Sequence[torch.Tensor]) -> float | None:
    values = np.concatenate([part.numpy() for part in parts]) if parts else np.zeros(0)
    return float(np.median(values)) if values.size else None


def _largest(points: Sequence[PointReading]) -> float | None:
    values = np.concatenate([point.norms.numpy() for point in points])
    return float(values.max()) if values.size else None


def _underflow(columns: Sequence[Sequence[PointReading]]) -> Layers:
    found: list[float | None] = []
    for column in columns:
        entries = sum(point.entries for point in column)
        small = sum(point.zeros + point.subnormals for point in column)
        found.append(small / entries if entries else None)
    return tuple(found)
