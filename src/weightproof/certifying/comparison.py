"""Compare two model folders at the tiers that need only weights, as a session compares a model with its baseline.

The base is read exactly, the subject by the routes of a session: tensors with equal digests are not read again,
norms of changed matrices are decided by the delta ladder, spike counts by Weyl's inequality, and spectra are taken
only where those leave the answer open. At any time one tensor of each folder is in memory, with a few copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weightproof import kinds
from weightproof.collective import Processes
from weightproof.errors import InputError
from weightproof.folders.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from weightproof.folders.file_digests import file_digests
from weightproof.guards.limits import for_family
from weightproof.judgement.judging import Judged
from weightproof.policy import Policy
from weightproof.probes import with_circuits
from weightproof.readings.changes import ChangeScope, change_of, kept_circuits
from weightproof.readings.folders import (
    FolderReadings,
    circuits_of,
    digests_of,
    read_folder,
    read_state_of,
    structure_of,
    tensor_readings,
    with_unknowns,
)
from weightproof.readings.tensors import require_finite
from weightproof.registry import load_plugin
from weightproof.types import BulkFit, ContractReading, EditRecord, Readings, TensorReading, WeightMatrix

__all__ = ["Comparison", "FolderReadings", "compare_folders", "read_folder"]


@dataclass(frozen=True)
class Comparison:
    """Two folders, read.

    Attributes:
        before: Readings of the base.
        after: Readings of the subject, with the record of the change between them.
        files: SHA-256 of the subject's files by relative path.
        tensors: Digests of the subject's tensors by name in memory.
        base_files: As `files`, of the base.
        base_tensors: As `tensors`, of the base.
        fits: The base's Marchenko-Pastur fits by matrix.
    """

    before: Readings
    after: Readings
    files: Mapping[str, str]
    tensors: Mapping[str, str]
    base_files: Mapping[str, str]
    base_tensors: Mapping[str, str]
    fits: Mapping[str, BulkFit]

    @property
    def judged(self) -> Judged:
        """For `judging.judge_all`: the base is both the baseline and the state just before the change."""
        return Judged(self.before, self.before, self.after)


def compare_folders(  # noqa: PLR0913 - two folders, and how to look at them
    base: Path | str,
    subject: Path | str,
    policy: Policy,
    *,
    kind: object = None,
    targets: Sequence[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Read two model folders and what changed between them.

    Args:
        base: Folder of the model before the change.
        subject: Folder of the model after it.
        policy: Says how closely to look: its limits decide where a bound is enough.
        kind: What the change claims to be, as in `GuardSession.edit`.
        targets: Globs of the tensors that may change; None allows all.
        progress: Show bars where somebody watches a terminal.

    Raises:
        InputError: If a folder is missing, torn or unsafe, or the two are not versions of one model.
        BaselineError: If the base itself holds NaN or inf.
    """
    declared = kinds.parse_kind(kind)
    old, new = open_checkpoint(Path(base)), open_checkpoint(Path(subject))
    _require_one_model(old, new)
    base_files, files = file_digests(old.folder), file_digests(new.folder)
    _require_expected(new, declared)
    if isinstance(declared, kinds.LoraMerge):
        declared = declared.read_as(new.matrices)
    before = read_state_of(old, progress=progress)
    require_finite(before.readings.tensors, f"the base {old.folder}", "repair or download it again")
    tensors = tensor_readings(new, progress=progress)
    differing = _differing(before.readings.tensors, tensors)
    in_both = {name for name in differing if name in tensors and name in before.readings.tensors}
    scope = ChangeScope(
        norm_band=_norm_band(policy),
        count_slack=_count_slack(policy),
        bulk_names=None,
        touched=frozenset(in_both),
        kind=declared,
    )
    change = change_of(
        new.matrices, tensors, structure_of(new), FolderOriginals(old), before, before, scope, Processes.alone()
    )
    circuits = circuits_of(new, kept_circuits(tensors, before, before, scope))
    change = replace(change, state=with_circuits(change.state, circuits))
    record = EditRecord(
        name=Path(subject).resolve().name,
        kind=declared.name,
        params=declared.params(),
        targets=None if targets is None else tuple(targets),
        changed_names=tuple(sorted(differing)),
        replaced_modules=(),
        digest_before=before.readings.model_digest,
        digest_after=change.state.readings.model_digest,
        relative_delta=change.relative_delta,
        contract=(*change.contract, *_contract_outside(old, new, in_both, declared)),
    )
    after = replace(with_unknowns(change.state).readings, edit=record)
    return Comparison(
        before=before.readings,
        after=after,
        files=files,
        tensors=digests_of(after),
        base_files=base_files,
        base_tensors=digests_of(before.readings),
        fits=before.fits,
    )


class FolderOriginals:
    """The matrices of the base folder, each read when it is asked for."""

    def __init__(self, base: Checkpoint) -> None:
        self._matrices = {matrix.name: matrix for matrix in base.matrices if matrix.refusal is None}

    def original_matrix(self, matrix: WeightMatrix) -> torch.Tensor | None:
        known = self._matrices.get(matrix.name)
        return None if known is None else known.load()

    def original_shard(self, matrix: WeightMatrix) -> torch.Tensor | None:
        return self.original_matrix(matrix)


def _differing(before: Mapping[str, TensorReading], after: Mapping[str, TensorReading]) -> set[str]:
    """Names of the tensors that are not the same bits in both, or in one only."""
    both = before.keys() & after.keys()
    changed = {name for name in both if before[name].digest != after[name].digest}
    return changed | (before.keys() ^ after.keys())


def _norm_band(policy: Policy) -> Callable[[str], float]:
    limits = policy.limits_for(load_plugin("weightproof.guards", "spectral"))
    return lambda family: for_family(limits.kappa, family)


def _count_slack(policy: Policy) -> Callable[[str, int], int]:
    """Half of the band within which a family's spike count is judged: the most a bound may leave open."""
    limits = policy.limits_for(load_plugin("weightproof.guards", "rmt"))
    return lambda family, count: int(limits.band(family, count)) // 2


# ---------------------------------------------------------------- what was declared, outside of matrices


def _contract_outside(
    old: Checkpoint, new: Checkpoint, changed: set[str], kind: kinds.Kind
) -> tuple[ContractReading, ...]:
    """The contract on changed biases, norms and buffers."""
    if isinstance(kind, kinds.Plain):
        return ()
    in_matrices = {matrix.tensor_name for matrix in new.matrices}
    then = {stored.name: stored for stored in old.tensors}
    asked = changed | kinds.expected_names(kind) & then.keys()
    found: list[ContractReading] = []
    for stored in new.tensors:
        if stored.name in asked and stored.name not in in_matrices and then[stored.name].shape == stored.shape:
            found += kinds.measure_outside(kind, stored.name, _values(then[stored.name]), _values(stored))
    return tuple(found)


def _values(stored: StoredTensor) -> torch.Tensor:
    return torch.cat(list(stored.blocks())) if len(stored.shape) > 1 else next(stored.blocks())


# ---------------------------------------------------------------- two versions of one model


def _require_expected(new: Checkpoint, kind: kinds.Kind) -> None:
    """What the kind says must change is there at all."""
    known = {matrix.name for matrix in new.matrices} | {stored.name for stored in new.tensors}
    if missing := sorted(kinds.expected_names(kind) - known):
        raise InputError(
            f"the declared kind changes {missing[0]}, which is not in {new.folder} ({len(missing)} names are missing): "
            "it is an adapter of another model, or the tensor is stored under the name of one that it is tied to"
        )


def _require_one_model(old: Checkpoint, new: Checkpoint) -> None:
    """Refuse two architectures: a list of hundreds of missing tensors would say less than one sentence."""
    kinds_of = [str(one.config.get("model_type") or (one.config.get("architectures") or [""])[0]) for one in (old, new)]
    if kinds_of[0] != kinds_of[1]:
        raise InputError(
            f"{old.folder} is a {kinds_of[0] or 'model of unknown type'} and {new.folder} a "
            f"{kinds_of[1] or 'model of unknown type'}: a certificate compares two versions of one model"
        )
    shapes = {stored.name: stored.shape for stored in old.tensors}
    if not any(shapes.get(stored.name) == stored.shape for stored in new.tensors):
        raise InputError(
            f"{old.folder} and {new.folder} have no tensor of one name and shape in common: a certificate compares two "
            "versions of one model"
        )
