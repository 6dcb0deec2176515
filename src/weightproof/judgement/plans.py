"""Carry out an edit: let it see the model, find what it changes, write what it plans through the snapshot's writer.

A matrix that every process holds whole is planned and written by each of them, from equal values to
equal values. The parts of a sharded one travel to its owner, which plans it; the new parts travel back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from weightproof.collective import Processes, deal
from weightproof.edits import VECTOR_FAMILY
from weightproof.errors import InputError
from weightproof.parallel.placements import local_of, refusal_of
from weightproof.parallel.shards import Shard, assemble, distribute, rounds, shard_of
from weightproof.probes import screen_cost
from weightproof.snapshot import write_matrix, write_part
from weightproof.snapshots.tensor_store import tensor_digest
from weightproof.transactions.steps import Step
from weightproof.types import NamedTensor, WeightMatrix
from weightproof.weights import iter_tensors, iter_weight_matrices

Plan = Callable[[WeightMatrix], torch.Tensor | None]


def prepared(edit: Any, session: Any) -> Any:
    """The edit after it has seen the model, where it must (`prepare`): the weights are as they were.

    Args:
        edit: Any edit (see `weightproof.edits`).
        session: With `model`, `processes` and `windows`; every process calls this alike.
    """
    prepare = getattr(edit, "prepare", None)
    return edit if prepare is None else prepare(session)


def carried_out(step: Step, edit: Any) -> Step:
    """Note the edit in its step, both without what was only needed to plan and to judge: a session keeps its steps."""
    step.edit, step.kind = _light(edit), _light(step.kind)
    return step


def _light(thing: Any) -> Any:
    light = getattr(thing, "light", None)
    return thing if light is None else light()


def selected(model: nn.Module, edit: Any) -> list[WeightMatrix]:
    """What an edit changes: matrices and, of an edit with `touches_vectors`, biases and norms as n x 1 matrices.

    Raises:
        InputError: If it selects nothing, a pattern of its `include` chooses nothing, or a tensor that it selects
            cannot be written in place.
    """
    matrices = list(iter_weight_matrices(model))
    if getattr(edit, "touches_vectors", False):
        matrices += vectors(model)
    chosen = [matrix for matrix in matrices if matrix.refusal is None and edit.selects(matrix)]
    families = ", ".join(sorted({matrix.family for matrix in matrices if matrix.refusal is None})) or "(none)"
    known = f"its matrices are of the families {families}; a family is chosen by its exact name"
    # First: an edit may know why what its patterns name cannot be edited.
    unmatched = edit.unmatched(matrices) if hasattr(edit, "unmatched") else ()
    if not chosen:
        raise InputError(
            f"edit {edit.name!r} selects no weight matrix of this model: check include= and exclude= ({known})"
        )
    if unmatched:
        raise InputError(
            f"edit {edit.name!r}: include={', '.join(map(repr, unmatched))} chooses no weight matrix of this model, so "
            f"that part of the edit would silently not happen: correct it or leave it out ({known})"
        )
    copies = [matrix.name for matrix in chosen if not matrix.is_view]
    if copies:
        raise InputError(
            f"edit {edit.name!r} cannot write {', '.join(copies[:3])}: the model does not keep it as a plain tensor "
            "(it is packed, or strided in an unusual way). Edit the model before it is quantized, or exclude= it"
        )
    return chosen


def vectors(model: nn.Module) -> list[WeightMatrix]:
    """Every parameter of fewer than two dimensions (biases, gains of norms) as an n x 1 matrix of family "vector"."""
    return [_vector(named) for named in iter_tensors(model) if not named.is_buffer and len(named.shape) < 2]


def _vector(named: NamedTensor) -> WeightMatrix:
    refusal = refusal_of(named.tensor)
    if refusal is None and not local_of(named.tensor).is_floating_point():
        refusal = f"it is stored as {named.tensor.dtype}, which holds codes, not weights"
    shard = None if refusal else shard_of(named.tensor)
    matrix = WeightMatrix(
        name=named.name,
        family=VECTOR_FAMILY,
        d_out=named.shape[0] if named.shape else 1,
        d_in=1,
        dtype=named.tensor.dtype,
        tied_names=named.tied_names,
        tensor_name=named.name,
        load=lambda: local_of(named.tensor).reshape(-1).unsqueeze(1),
        refusal=refusal,
        select=lambda tensor: tensor.reshape(-1, 1),
    )
    return matrix if shard is None else replace(matrix, shard=_as_column(shard))


def _as_column(shard: Shard) -> Shard:
    """A shard of a vector as one of an n x 1 matrix; flat parts stay flat."""
    local = shard.local if shard.layout == "flat" else shard.local.unsqueeze(1)
    return replace(shard, shape=(*shard.shape, 1), local=local)


def rewrite(processes: Processes, operation: str, matrices: Sequence[WeightMatrix], plan: Plan) -> dict[str, str]:
    """Write what `plan` makes of each matrix (None leaves it), and give the digests of what it planned.

    Args:
        processes: Who takes part.
        operation: Shown in errors, for example the edit's name.
        matrices: The same on every process.
        plan: From a matrix, whose `load()` gives all of it, to new (d_out, d_in) values. Pure.
    """
    planned: dict[str, str] = {}
    with processes.together(operation):
        for matrix in matrices:
            if matrix.shard is None:
                values = plan(matrix)
                if values is not None:
                    planned[matrix.name] = tensor_digest(values.to(matrix.dtype))
                    write_matrix(matrix, values)
                    del values  # before the next is made
    sharded = [(matrix, matrix.shard) for matrix in matrices if matrix.shard is not None]
    costs = [screen_cost(matrix) for matrix, _ in sharded]
    owners = deal(costs, processes.size)
    for indices in rounds(owners, costs, processes.size):
        planned |= _rewrite_shards(processes, operation, [(owners[index], *sharded[index]) for index in indices], plan)
    return planned


def _rewrite_shards(
    processes: Processes, operation: str, owned: Sequence[tuple[int, WeightMatrix, Shard]], plan: Plan
) -> dict[str, str]:
    """One round of `rewrite`, at most one sharded matrix for each owner."""
    wholes = assemble(processes, operation, [(owner, shard) for owner, _, shard in owned])
    with processes.together(operation):
        new = [
            None if whole is None else _planned(matrix, whole, plan)
            for (_, matrix, _), whole in zip(owned, wholes, strict=True)
        ]
        del wholes  # what was planned is all that is needed of them
        ours = {
            m.name: tensor_digest(values) for (_, m, _), values in zip(owned, new, strict=True) if values is not None
        }
    planned: dict[str, str] = {}
    for theirs in processes.gather(operation, ours):
        planned |= theirs
    written = [
        (owner, matrix, shard, values)
        for (owner, matrix, shard), values in zip(owned, new, strict=True)
        if matrix.name in planned
    ]
    parts = distribute(processes, operation, [(owner, shard, values) for owner, _, shard, values in written])
    with processes.together(operation):
        for (_, matrix, _, _), part in zip(written, parts, strict=True):
            write_part(matrix, part)
    return planned


def _planned(matrix: WeightMatrix, whole: torch.Tensor, plan: Plan) -> torch.Tensor | None:
    values = plan(replace(matrix, shard=None, load=lambda: whole))
    return None if values is None else values.to(device=whole.device, dtype=matrix.dtype)
