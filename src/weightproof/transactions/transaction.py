"""One guarded change: a safe point, the change (any code), measured, judged, then kept, or restored and proven.

A `Transaction` holds everything that moves through one change. It knows no tracker, file or training loop: whoever
opens one says who is told of it (`Recorder`), and what becomes of it once it is judged (`Transaction.settle`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from weightproof.baseline import Baseline
from weightproof.errors import EditRejectedError, InputError, RestoreError
from weightproof.guards.corrections import Correction, apply_correction
from weightproof.judgement.plans import rewrite
from weightproof.probes import State
from weightproof.transactions.edit_records import Subject
from weightproof.transactions.guarded_model import GuardedModel
from weightproof.transactions.steps import SafePoint, Step
from weightproof.types import Action, WeightMatrix
from weightproof.weights import iter_weight_matrices

logger = logging.getLogger("weightproof")


class Recorder(Protocol):
    """Who is told of every judged change; see `weightproof.transactions.publisher`."""

    def draw(self, step: Step, model: nn.Module, baseline: Baseline) -> None:
        """Called while the changed weights are in place."""
        ...

    def publish(self, step: Step) -> None:
        """Called when what was decided is done."""
        ...


class Unrecorded:
    """Nobody is told: of a trial that is taken back whatever the verdict."""

    def draw(self, step: Step, model: nn.Module, baseline: Baseline) -> None:
        """Nothing is drawn."""

    def publish(self, step: Step) -> None:
        """Nothing is recorded."""


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

    def judge_again(self) -> None:
        """The same after a part of the change was corrected or taken back; the time of both counts."""
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
