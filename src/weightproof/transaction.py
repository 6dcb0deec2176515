"""One guarded change: a safe point, the change (any code), measured, judged, then kept, or restored and proven.

A `Transaction` holds everything that moves through one change. It knows no tracker, file or training loop: whoever
opens one says who is told of it (`Recorder`), and what becomes of it once it is judged (`Transaction.settle`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import nn

from weightproof.baseline import Baseline
from weightproof.edit_records import Subject
from weightproof.equalisation import equalise, scales_for
from weightproof.errors import EditRejectedError, InputError, RestoreError
from weightproof.foreign_edits import Traces, infer
from weightproof.guarded_model import GuardedModel
from weightproof.guards.corrections import Correction, apply_correction
from weightproof.guards.scope import Scope
from weightproof.judging import Judged
from weightproof.kinds import bound
from weightproof.partial_revert import (
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
from weightproof.plans import rewrite
from weightproof.preserving import NAME as PRESERVING
from weightproof.probes import State, common_matrices
from weightproof.steps import SafePoint, Step
from weightproof.tensor_readings import digests_at
from weightproof.tensor_store import model_digest
from weightproof.types import Action, Decision, WeightMatrix
from weightproof.weights import iter_weight_matrices

logger = logging.getLogger("weightproof")


class Recorder(Protocol):
    """Who is told of every judged change; see `weightproof.publisher`."""

    def draw(self, step: Step, model: nn.Module, baseline: Baseline) -> None:
        """Called while the changed weights are in place."""
        ...

    def publish(self, step: Step) -> None:
        """Called when what was decided is done."""
        ...


class Transaction:
    """One change of a guarded model. All ranks make the same calls.

    Args:
        guarded: The model.
        handle: The step that is filled in.
        point: What the model goes back to.
        before: Readings of the state in `point`.
        subject: What is judged.
        recorder: Who is told.

    Attributes:
        after: Readings of the changed model; `before` until it was judged.
    """

    def __init__(  # noqa: PLR0913 - everything that one change consists of
        self,
        guarded: GuardedModel,
        handle: Step,
        point: SafePoint,
        *,
        before: State,
        subject: Subject,
        recorder: Recorder,
    ) -> None:
        self.guarded = guarded
        self.handle = handle
        self.point = point
        self.before = self.after = before
        self.subject = subject
        self._recorder = recorder

    # -- measure and judge ---------------------------------------------------------------------

    def judge(self) -> None:
        """Read and judge the model as it is now; corrections that the policy asks for are written and judged too."""
        guarded, handle, subject = self.guarded, self.handle, self.subject
        started = time.perf_counter()
        with guarded.processes.together(f"judging {handle.name!r}"):
            snapshot, assess = self.point.snapshot, guarded.assessor.assess
            result = assess(snapshot, self.before, guarded.baseline, subject, handle.step)
            fixes = guarded.assessor.corrections(guarded.baseline, result.state.readings)
            if fixes:
                subject = replace(subject, planned={}, corrected=self._correct(fixes))
                result = assess(snapshot, self.before, guarded.baseline, subject, handle.step)
            handle.settle(result.decision, result.judged)
            self._recorder.draw(handle, guarded.model, guarded.baseline)
        handle.seconds = time.perf_counter() - started
        guarded.cost.check_seconds += handle.seconds
        guarded.cost.checks += 1
        self.after = result.state

    def _judge_again(self) -> None:
        spent = self.handle.seconds
        self.judge()
        self.handle.seconds += spent

    def _correct(self, fixes: Sequence[tuple[Correction, str]]) -> tuple[str, ...]:
        """Write each correction once, tied copies with it; returns what was done, in words."""
        asked = {correction.name: (correction, mode) for correction, mode in fixes}

        def plan(matrix: WeightMatrix) -> torch.Tensor:
            return apply_correction(matrix.load(), *asked[matrix.name])

        matrices = [matrix for matrix in iter_weight_matrices(self.guarded.model) if matrix.name in asked]
        rewrite(self.guarded.processes, "corrections", matrices, plan)
        return tuple(f"{mode} {correction.name}" for correction, mode in fixes)

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

    # -- what kind of change it was -------------------------------------------------------------

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
        self._judge_again()

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
            self._judge_again()
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

    def settle(self, on_violation: str, keep: Callable[[], None], take_back: Callable[[], None]) -> None:
        """Keep the change or take it back, as was decided, and tell the recorder.

        Args:
            on_violation: As in `GuardSession.edit`.
            keep: What keeping this change means.
            take_back: What taking it back means.

        Raises:
            EditRejectedError: With `on_violation="raise"`, after the rejected change was taken back.
            RestoreError: If taking it back could not be proven exact (the decision is then HALT).
        """
        handle, decision = self.handle, self.handle.decision
        if decision is None:
            raise InputError(f"step {handle.name!r} was not judged")
        kept = decision.action is Action.KEEP or handle.monitor
        handle.applied = "kept" if kept else "restored"
        if kept:
            keep()
        else:
            try:
                take_back()
            except RestoreError as error:
                handle.applied = "not restored"
                handle.decision = self.guarded.assessor.halted(decision, str(error))
                self._recorder.publish(handle)
                raise
        self._recorder.publish(handle)
        if on_violation == "raise" and not kept:
            raise EditRejectedError(f"{handle.name} was rolled back: {decision.reason}")

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
) -> Iterator[Transaction]:
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
    change = Transaction(guarded, handle, point, before=guarded.present, subject=subject, recorder=recorder)
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
