"""The transaction of an edit: what changed unseen before it, what kind it was, and what of it can be saved.

Of a rejected edit the worst part may go back alone (`revert_worst`); an edit that a library made is recognised by what
it left behind; where the policy asks for it, an edit is equalised before it is judged for good.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from weightproof.contracts.preserving import NAME as PRESERVING
from weightproof.errors import RestoreError
from weightproof.guards.scope import Scope
from weightproof.judgement.judging import Judged
from weightproof.kinds import bound
from weightproof.probes import common_matrices
from weightproof.readings.tensors import digests_at
from weightproof.snapshots.tensor_store import model_digest
from weightproof.transactions.edit_records import Subject
from weightproof.transactions.equalisation import equalise, scales_for
from weightproof.transactions.foreign_edits import Traces, infer
from weightproof.transactions.guarded_model import GuardedModel
from weightproof.transactions.partial_revert import (
    Reverts,
    breaches,
    by_module,
    module_changes,
    ranked,
    relative_changes,
    rounds,
    weight_of,
    without,
)
from weightproof.transactions.steps import Step
from weightproof.transactions.transaction import Recorder, Transaction
from weightproof.types import Action, Decision

logger = logging.getLogger("weightproof")


class EditTransaction(Transaction):
    """One edit: judged against the baseline, and its contract against the state just before it."""

    # -- before and after the block -------------------------------------------------------------

    def note_strays(self) -> None:
        """Note the tensors that changed since the last accepted state, outside of any guarded change."""
        guarded, known = self.guarded, self.before.readings.tensors
        processes = guarded.processes
        with processes.together("digests of the snapshot"):
            digests = digests_at(self.point.snapshot, guarded.model, processes)
        # A copy that was not that of rank 0 (a buffer that training moved) has no known digest: it is not compared.
        own = {name for name, reading in known.items() if processes.rank in reading.differing_ranks}
        differing = {name for name, digest in digests.items() if name not in known or known[name].digest != digest}
        ours = sorted((differing - own) | (known.keys() - digests.keys()))
        stray = frozenset().union(*processes.gather("tensors changed outside of an edit", ours))
        if not stray:
            return
        shown = ", ".join(sorted(stray)[:3])
        logger.warning(
            "tensors changed outside of any guarded edit: %d (%s); they are judged with this one", len(stray), shown
        )
        # Hashing the whole state is spared where it is known to be the one that was read before.
        before = processes.broadcast("digest before the edit", model_digest(digests))
        self.subject = replace(self.subject, stray=stray, digest_before=before)

    def begin(self) -> Traces | None:
        """Ready what only the state before the edit can tell; the traces of libraries, where no kind was declared."""
        guarded, kind = self.guarded, self.handle.kind
        known = self.before.readings.model_digest == guarded.baseline.readings.model_digest and not self.subject.stray
        guarded.assessor.capture_reference(wanted=kind.name == PRESERVING and not known, current_is_baseline=known)
        with guarded.processes.together(f"traces before {self.handle.name!r}"):
            return None if self.handle.declared else Traces.of(guarded.model)

    def recognise(self, traces: Traces | None) -> None:
        """Hold the edit to the contract of what a known library left behind; the same on every process."""
        if traces is None:
            return
        guarded, handle = self.guarded, self.handle
        with guarded.processes.together(f"recognising {handle.name!r}"):
            found = infer(traces, guarded.model, self.point.snapshot)
        said = None if found is None else (found.kind.name, str(found.kind.params()), found.because)
        every = guarded.processes.gather("kind of the edit", said)
        if found is None or any(theirs != said for theirs in every):
            return
        handle.kind = found.kind
        self.subject = replace(self.subject, kind=found.kind, inferred=found.because)
        logger.info("%s is recognised as %s: %s", handle.name, found.kind.name, found.because)

    # -- save what can be saved of an edit -----------------------------------------------------

    def equalise(self) -> None:
        """Variance equalisation of an edit, where the policy asks for it and the loss gains; judged again then."""
        guarded, handle, subject = self.guarded, self.handle, self.subject
        limits, record = guarded.assessor.limits["variance"], handle.record
        if not limits.equalise or handle.monitor or record is None or handle.kind.name == "train":
            return
        scope, cache = Scope(guarded.baseline.readings), guarded.assessor.cache
        matrices = [
            one
            for one in common_matrices(guarded.model, guarded.processes)
            if subject.targets is None or scope.covers(one.tensor_name, subject.targets)
        ]
        moments = cache.second_moments if cache else {}
        scales = scales_for(moments, self.after.readings.second_moments, matrices, limits)
        if not scales:
            return
        probe = guarded.assessor.loss
        done = equalise(guarded.model, scales, probe, limits.equalise_min_effect, guarded.processes)
        logger.info("variance equalisation of %s: %s", handle.name, done.reason)
        if not done.kept:
            return
        scaled = {name for scale in scales for name in scale.matrices}
        self.subject = replace(
            subject,
            planned={name: digest for name, digest in subject.planned.items() if name not in scaled},
            corrected=(*record.corrections, *done.corrections),
            contract=record.contract,  # what the edit was, before it was scaled
        )
        self.judge_again()

    def revert_worst(self) -> None:
        """Take back the worst of a rejected edit, a little more in each round, until the rest of it is kept.

        Where nothing passes the decision on the whole edit stands, and `settle` restores everything.
        """
        handle, whole = self.handle, self.subject
        rejected, reverted = (handle.decision, handle.judged), frozenset[str]()
        spectra = handle.spectra
        for chosen in self._blamed():
            if not self._is_rejected:
                return
            with self.guarded.processes.together(f"reverting a part of {handle.name!r}"):
                chosen.carry_out(self.point.snapshot)
            reverted |= chosen.tensors
            self.subject = without(whole, reverted)
            self.judge_again()
        if self._is_rejected and reverted:
            handle.settle(*cast("tuple[Decision, Judged]", rejected))
            handle.spectra = spectra

    @property
    def _is_rejected(self) -> bool:
        decision = self.handle.decision
        return decision is not None and decision.action is Action.ROLLBACK

    def _blamed(self) -> Iterator[Reverts]:
        """What to take back in each round, the same on every process; whole modules where objects were replaced."""
        handle, snapshot, guarded = self.handle, self.point.snapshot, self.guarded
        record = handle.record
        if not self._is_rejected or record is None:
            return
        changed = frozenset(record.changed_names)
        ours = bool(snapshot.replaced_modules() or snapshot.displaced(changed))
        modules = None
        if any(guarded.processes.gather("what can be reverted in part", ours)):
            modules = by_module(snapshot, changed)
            moved = module_changes(guarded.model, snapshot, record, guarded.processes)
        else:
            moved = relative_changes(guarded.model, snapshot, changed, guarded.processes)
        errors = guarded.assessor.block_errors()
        moved = {name: change for name, change in moved.items() if change > 0.0}
        groups = ranked(guarded.model, moved, errors, breaches(handle.verdicts))
        for chosen in rounds(groups):
            names = frozenset(name for group in chosen for name in group.tensors)
            if modules is None:
                yield Reverts(names)
            else:
                within = frozenset(module for module in modules if weight_of(module) in names)
                yield Reverts(names.union(*(modules[module] for module in within)), within)

    # -- carry the decision out ----------------------------------------------------------------

    def keep(self) -> None:
        """The edit becomes the accepted state of the model, and of the optimizer's copies of it."""
        handle = self.handle
        self._refresh_masters()
        kept = handle.decision is not None and handle.decision.action is Action.KEEP
        self.guarded.accept(self.after, as_baseline=kept and handle.kind.name == "train")

    def take_back(self) -> None:
        """The model goes back as it was before the edit."""
        self.guarded.restore(self.point)
        self.point.snapshot.discard()

    def _refresh_masters(self) -> None:
        """Write a kept edit into the optimizer's copies; half written ones go back with the weights."""
        handle, masters = self.handle, self.guarded.masters
        if masters is None or handle.record is None:
            return
        try:
            with self.guarded.processes.together("writing the optimizer's master weights"):
                masters.refresh(handle.record.changed_names)
                if stale := sorted(set(masters.stale()) & set(handle.record.changed_names)):
                    raise RestoreError(
                        f"the optimizer's master weights did not take {handle.name!r}, so its next step would undo it: "
                        f"{', '.join(stale[:3])} ({len(stale)} tensors); the edit was taken back"
                    )
        except BaseException:
            handle.applied = None
            self.guarded.restore(self.point)
            raise


@contextmanager
def edit_of(
    guarded: GuardedModel,
    handle: Step,
    targets: tuple[str, ...] | None,
    recorder: Recorder,
    *,
    reverts_worst: bool = False,
) -> Iterator[EditTransaction]:
    """The transaction of an edit: judged when its block ends, then to be settled by the caller.

    Args:
        guarded: The model.
        handle: The step that is filled in.
        targets: Globs of the tensors that may change; None allows all.
        recorder: Who is told of it.
        reverts_worst: Of a rejected edit, take back only what is to blame, as far as that passes.

    Raises:
        SnapshotError: If no snapshot can be taken; the block is not entered.
    """
    with guarded.processes.together(f"kind of {handle.name!r}"):
        handle.kind = bound(handle.kind, guarded.model)
    guarded.refresh_baseline()
    point = guarded.safe_point()
    subject = Subject(handle.name, handle.kind, targets)
    change = EditTransaction(guarded, handle, point, before=guarded.present, subject=subject, recorder=recorder)
    try:
        change.note_strays()
        # Where weights changed unseen, their losses are no reference: the loss is not measured then.
        if not change.subject.stray and handle.kind.name != "train":
            guarded.capture_losses()
        traces = change.begin()
        with guarded.processes.together(f"edit {handle.name!r}"):
            yield change
        kept = None if targets is None else tuple(name for name in targets if name not in handle.left_alone)
        change.subject = replace(change.subject, planned=handle.planned, targets=kept)
        change.recognise(traces)
        change.judge()
        change.equalise()
        if reverts_worst and not handle.monitor:
            change.revert_worst()
    except BaseException:
        # Whatever went wrong, in the block, in measuring or in drawing: the model goes back as it was.
        guarded.restore(point)
        point.snapshot.discard()
        raise
