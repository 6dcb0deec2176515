"""What is judged of a change, and the record of it: what its author declared beside what it left different."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from weightproof import kinds
from weightproof.collective import Processes
from weightproof.forward.reach import reach_of
from weightproof.parallel.placements import local_of, refusal_of
from weightproof.parallel.shards import Shard, dealt, shard_of
from weightproof.readings.changes import Change
from weightproof.readings.tensors import common_refusals
from weightproof.snapshot import Snapshot
from weightproof.types import ContractReading, EditRecord, HealthReading, NamedTensor, Readings, WindowReading
from weightproof.weights import iter_tensors, iter_weight_matrices


@dataclass(frozen=True)
class Subject:
    """What is being judged: the declaration of a change and what its author knows about it.

    `planned` maps matrix names to the digest of what our own edit meant to write there; `digest_before` is that of
    the model where it is not the state last read (None where it is). `contract` is what was measured of the edit's
    contract, where a correction of ours wrote over the edit since. `inferred` says what told the kind, where nobody
    declared it.
    """

    name: str
    kind: kinds.Kind
    targets: tuple[str, ...] | None
    planned: Mapping[str, str] = field(default_factory=dict)
    raw_losses: tuple[float, ...] | None = None
    loss_spike: bool | None = None
    in_warmup: bool = False
    window: WindowReading | None = None
    health: HealthReading | None = None
    stray: frozenset[str] = frozenset()
    corrected: tuple[str, ...] = ()
    reverted: tuple[str, ...] = ()
    contract: tuple[ContractReading, ...] | None = None
    digest_before: str | None = None
    inferred: str | None = None


@dataclass(frozen=True, slots=True)
class Differences:
    """What of a model is not as it is in a snapshot, on any process: tensors by name, replaced modules by path."""

    snapshot: Snapshot
    names: frozenset[str]
    replaced_modules: tuple[str, ...]

    @classmethod
    def of(cls, snapshot: Snapshot, processes: Processes) -> Differences:
        """Compare the model with its snapshot; the same on every process."""
        with processes.together("comparing with the snapshot"):
            ours = frozenset(snapshot.changed_names()), frozenset(snapshot.replaced_modules())
        every = processes.gather("changed tensors", ours)
        paths = {path for _, replaced in every for path in replaced}
        return cls(snapshot, frozenset().union(*(names for names, _ in every)), tuple(sorted(paths)))


def record_of(  # noqa: PLR0913 - what was declared, what was read, and who reads it
    subject: Subject, before: Readings, change: Change, found: Differences, *, model: nn.Module, processes: Processes
) -> EditRecord:
    """The record of a change, the same on every process.

    Args:
        subject: What was declared.
        before: Readings of the state before it.
        change: What was read of it.
        found: What it left different.
        model: The changed model.
        processes: Who takes part.
    """
    every, changed = list(iter_weight_matrices(model)), found.names | subject.stray
    in_matrices = frozenset(name for matrix in every for name in matrix.tensor_names)
    contract = subject.contract
    if contract is None:
        contract = (*change.contract, *_outside_readings(subject.kind, found, in_matrices, model, processes))
    return EditRecord(
        name=subject.name,
        kind=subject.kind.name,
        params=dict(subject.kind.params(), **({"inferred": subject.inferred} if subject.inferred else {})),
        targets=subject.targets,
        changed_names=tuple(sorted(changed)),
        replaced_modules=found.replaced_modules,
        digest_before=subject.digest_before or before.model_digest,
        digest_after=change.state.readings.model_digest,
        relative_delta=change.relative_delta,
        contract=contract,
        stray_names=tuple(sorted(subject.stray)),
        corrections=subject.corrected,
        reverted=subject.reverted,
        reach=None if subject.kind.name == "train" else reach_of(every, changed, named=subject.kind.name == "quantize"),
    )


def _outside_readings(
    kind: kinds.Kind, found: Differences, in_matrices: frozenset[str], model: nn.Module, processes: Processes
) -> list[ContractReading]:
    """The contract on changed biases, norms and buffers, and on what cannot be read of any changed tensor.

    Tensors that were added or reshaped break the structure anyway.
    """
    if isinstance(kind, kinds.Plain):
        return []
    present = {named.name: named for named in iter_tensors(model)}
    refusals = {name: refusal_of(present[name].tensor) for name in found.names & present.keys()}
    unread = common_refusals({name: why for name, why in refusals.items() if why is not None}, processes)
    unheld = [_unread_contract(kind, name, why, is_matrix=name in in_matrices) for name, why in sorted(unread.items())]
    asked = found.names | kinds.expected_names(kind)
    outside = (asked - in_matrices) & found.snapshot.names & present.keys()
    changed = [present[name] for name in sorted(outside - unread.keys())]

    def original(named: NamedTensor) -> Tensor | Shard:
        shard, kept = shard_of(named.tensor), found.snapshot.original(named.name)
        return kept if shard is None else replace(shard, local=kept)

    def measure(named: NamedTensor, now: Tensor, then: Tensor | None) -> tuple[ContractReading, ...]:
        if then is None or then.shape != now.shape:
            return ()
        return tuple(kinds.measure_outside(kind, named.name, then, now.detach()))

    readings = dealt(
        processes,
        changed,
        cost=lambda named: float(named.tensor.numel()),
        parts=(lambda named: shard_of(named.tensor) or local_of(named.tensor), original),
        work=measure,
        operation="contracts outside of the matrices",
    )
    return [reading for one in (*unheld, *readings) for reading in one]


def _unread_contract(kind: kinds.Kind, name: str, reason: str, *, is_matrix: bool) -> tuple[ContractReading, ...]:
    """The contract of a changed tensor whose parts nobody can join: only that it changed can be held against it."""
    if is_matrix or isinstance(kind, kinds.Cast) or name in kinds.expected_names(kind):
        return (ContractReading(name, "values", None, 0.0, rigorous=True, reason=reason),)
    nothing = torch.empty(0)
    return kinds.measure_outside(kind, name, nothing, nothing)
