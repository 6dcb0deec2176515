"""The guard session: every change of the weights becomes a transaction with evidence.

begin (snapshot) -> change (any code) -> measure -> judge -> keep, or restore and prove it.

Edits are judged against the baseline, so that many small harms add up; what an edit declared is
judged against the state just before it. A window of ordinary training (`check_window`, or an edit of
kind "train") is judged against the last good state and, when kept, becomes the new baseline.

In a run of many processes every one of them makes the session and calls each method alike, around
its own part of the model: readings are shared out, the decision is one, only rank 0 writes files.

    >>> session = GuardSession(model, policy="balanced")           # doctest: +SKIP
    >>> with session.edit("int8") as step:                          # doctest: +SKIP
    ...     quantize_(model)
    >>> step.decision.action, step.applied                          # doctest: +SKIP
    (<Action.KEEP: 'KEEP'>, 'kept')
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weightproof import kinds
from weightproof.baseline import Baseline
from weightproof.certificate import Certificate
from weightproof.curvature.factors import Factors
from weightproof.edits import VECTOR_FAMILY
from weightproof.errors import InputError
from weightproof.judgement import evidence
from weightproof.judgement.assessment import Assessor
from weightproof.judgement.curvature_probe import factors_of
from weightproof.judgement.plans import carried_out, prepared, rewrite, selected
from weightproof.parallel.placements import settle
from weightproof.policy import Policy, load_policy
from weightproof.probes import State
from weightproof.trackers import Tracker
from weightproof.transactions.checks import (
    from_main,
    parse_targets,
    processes_of,
    require_same,
    require_same_call,
    settings_of,
)
from weightproof.transactions.edit import EditTransaction, edit_of
from weightproof.transactions.guard_state import STATE_FILE, GuardState
from weightproof.transactions.guarded_model import GuardedModel
from weightproof.transactions.publisher import Publisher
from weightproof.transactions.rolling import Rolling
from weightproof.transactions.steps import Cost, MasterWeights, Step
from weightproof.transactions.training_turns import TrainingTurns
from weightproof.transactions.training_windows import TrainingWindows, Window
from weightproof.transactions.transaction import Unrecorded
from weightproof.types import Action, HealthReading, WeightMatrix, WindowReport

logger = logging.getLogger("weightproof")

ON_VIOLATION = ("rollback", "raise", "monitor", "revert-worst")

__all__ = ["STATE_FILE", "GuardSession"]


class GuardSession:
    """Guards one model over a series of changes.

    Args:
        model: Any `torch.nn.Module`; wrappers (DDP, compile, PEFT) are looked through.
        policy: Tier name (conservative, balanced, aggressive), path of a policy file, or `Policy`.
        retain: Data on which the model must not get worse: an iterable of dicts with `input_ids`
            (a `datasets.Dataset` too), of tensors, or of token lists. Without it random tokens
            decide, with assurance `outputs-only`; with enough of it (the policy's floors) the loss does.
            See `weightproof.losses.LossData` for files of text and metrics of your own.
        target: Data on which an edit must gain; where it is given, no gain rejects.
        accelerator: `accelerate.Accelerator` of the run, if any; trackers that log through it get it.
        trackers: Trackers, or their registered names ("jsonl", "wandb").
        output_dir: Folder for the certificate and the JSONL log; nothing is written without it.
        baseline: A `Baseline` (or its path) captured earlier from this very model.
        snapshot_dir: Keep snapshots in this folder instead of in memory.
        timeout: Seconds that a process waits for the others before it gives the run up and says for whom it waited.
        tokenizer_digest: What made the token ids of the data, where it is known: goes into the evidence.
        factors: Kronecker factors of this very model (`weightproof.fit_factors`), or their file: the guard `curvature`
            then foretells what each edit costs and names the matrix that is to blame. Advice; it decides nothing.
        masters: fp32 copies that the optimizer writes back (DeepSpeed); `weightproof.attach` finds them.

    Attributes:
        guarded: The model, the last state of it that was accepted, and what judges it.
        training: Windows of training: their losses, and the good states that a run goes back to.

    Raises:
        BaselineError: The model already holds NaN or inf, differs between processes, or `baseline` is of another
            model.
        CollectiveError: Another process failed, or did not come within `timeout`.
        InputError: `retain` is empty or unusable, an argument is unknown or of a wrong type, `factors` are of other
            weights, or processes were given different policies, data or factors.
    """

    def __init__(  # noqa: PLR0913 - the public signature is the issue's
        self,
        model: torch.nn.Module,
        *,
        policy: str | Path | Policy = "balanced",
        retain: Any = None,
        target: Any = None,
        accelerator: Any = None,
        trackers: Sequence[Tracker | str] | None = None,
        output_dir: Path | str | None = None,
        baseline: Baseline | Path | str | None = None,
        snapshot_dir: Path | str | None = None,
        timeout: float = 600.0,
        masters: MasterWeights | None = None,
        tokenizer_digest: str | None = None,
        factors: Factors | Path | str | None = None,
    ) -> None:
        self.processes = processes_of(accelerator, timeout)
        self._open: Step | None = None
        self._closed = False
        self._resumed: list[Any] = []
        try:
            with self.processes.together("making the guard session"):
                self.policy = _policy_for(model, policy)
                known = None if factors is None else factors_of(factors)
                assessor = Assessor(
                    model, self.policy, retain, self.processes,
                    target=target, tokenizer_digest=tokenizer_digest, factors=known,
                )  # fmt: skip
                self.output_dir = Path(output_dir) if output_dir is not None else None
                folder = Path(snapshot_dir) if snapshot_dir is not None else None
                settings = settings_of(assessor, masters)
            advice = "Give every process the same (retain data before it is sharded over processes, for example)"
            require_same(self.processes, "settings of the guard", settings, advice)
            assessor.prove_factors()
            self.guarded = GuardedModel(assessor, baseline, masters=masters, snapshot_dir=folder)
            assessor.factors_are_of(self.guarded.baseline.model_digest)
            self._publisher = Publisher(self.processes, self.certificate, trackers, self.output_dir, accelerator)
            self.training = TrainingWindows(self.guarded, self._publisher)
        except BaseException:
            self.processes.close()  # nobody holds this session: its connections and threads would stay
            raise

    # -- what is known -------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """The guarded model, as it was given."""
        return self.guarded.model

    @property
    def baseline(self) -> Baseline:
        """What edits are judged against."""
        return self.guarded.baseline

    @property
    def current(self) -> State:
        """Readings of the last accepted state of the model."""
        return self.guarded.current

    @property
    def model_digest(self) -> str:
        """SHA-256 over the per-tensor digests of the last accepted state of the model."""
        return self.guarded.digest

    @property
    def masters(self) -> MasterWeights | None:
        """The optimizer's copies of the weights, where it writes them back."""
        return self.guarded.masters

    @property
    def snapshot_dir(self) -> Path | None:
        """Folder of the snapshots; None: in memory."""
        return self.guarded.snapshot_dir

    @property
    def cost(self) -> Cost:
        """What guarding cost so far."""
        return self.guarded.cost

    @property
    def history(self) -> tuple[Step, ...]:
        """Every judged step, oldest first."""
        return tuple(self._publisher.history)

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers that are open on this process: none on any but rank 0."""
        return self._publisher.trackers

    @property
    def resumed_steps(self) -> tuple[Any, ...]:
        """Steps judged before a resume, as the certificate carries them."""
        return tuple(self._resumed)

    @property
    def windows(self) -> tuple[Any, ...]:
        """The windows on which outputs are compared (random tokens, then `retain`), then those of the loss."""
        return self.guarded.assessor.all_windows

    @property
    def losses(self) -> tuple[float, ...]:
        """Raw losses of the last windows that were kept, oldest first."""
        return tuple(self.training.losses)

    @property
    def rolling(self) -> Rolling | None:
        """The good states of the run; None while nobody watches."""
        return self.training.rolling

    # -- edits ---------------------------------------------------------------------------------

    @contextmanager
    def edit(
        self,
        name: str,
        kind: object = None,
        targets: str | Iterable[str] | None = None,
        on_violation: str = "rollback",
        *,
        step: int | None = None,
    ) -> Iterator[Step]:
        """Guard the weight changes made in the block.

        Args:
            name: Shown in the certificate and the log.
            kind: What the edit claims to be: "unknown", "train", "preserving", or an object of `weightproof.kinds`
                such as `Quantize(8)`; its contract is checked. None: recognised where a known library did it (PEFT,
                pruning masks, quantizers, a cast), else "unknown".
            targets: Glob, or list of globs, of the tensors that may change; None allows all.
            on_violation: "rollback" restores; "raise" restores and raises `EditRejectedError`;
                "monitor" only reports; "revert-worst" restores only the tensors that are to blame, as few as it takes,
                and keeps the rest of the edit if that passes (`step.record.reverted` names them), else restores all.
            step: Number to log; counts up by default.

        Raises:
            CollectiveError: Another process failed or did not come; this one's weights were restored.
            EditRejectedError: With `on_violation="raise"`, after the rejected change was restored.
            RestoreError: If a restore could not be proven exact (the decision is then HALT).
            SnapshotError: If no snapshot can be taken; the block is not entered.
        """
        with self._begun(name, kind, on_violation, step) as handle:
            with self.processes.together(f"targets of {name!r}"):
                declared = parse_targets(targets)
            require_same_call(self.processes, handle, on_violation, targets=declared)
            worst = on_violation == "revert-worst"
            with edit_of(self.guarded, handle, declared, self._publisher, reverts_worst=worst) as change:
                yield handle
            change.settle(on_violation, keep=lambda: self._keep(change), take_back=change.take_back)

    def _keep(self, edit: EditTransaction) -> None:
        edit.keep()
        self.training.watch_on(edit.handle.step)  # no later rollback may undo a kept edit
        edit.point.snapshot.discard()

    def apply(self, edit: Any, *, on_violation: str = "rollback", step: int | None = None) -> Step:
        """Let an edit see the model where it must, plan it, write it, and judge it; see `weightproof.edits`.

        Raises:
            InputError: If the edit selects no matrix of this model, or one that it cannot change.
        """
        edit, chosen, targets = self._selected(edit)
        with self.edit(edit.name, edit.kind, targets, on_violation, step=step) as handle:
            self._write(handle, edit, chosen, targets)
        return carried_out(handle, edit)

    def trial(self, edit: Any) -> Step:
        """Judge an edit as `apply` does and take it back, whatever the verdict; `step.decision` is what it would be.

        It stands in no history, certificate or log: what is kept in the end is applied, and judged, once more. Each
        trial is one more look at the same data.

        Raises:
            InputError: As `apply`.
            RestoreError: If taking it back could not be proven exact.
        """
        edit, chosen, targets = self._selected(edit)
        with self._begun(edit.name, edit.kind, "rollback", None) as handle:
            require_same_call(self.processes, handle, "rollback", targets=tuple(targets))
            with edit_of(self.guarded, handle, tuple(targets), Unrecorded()) as change:
                self._write(handle, edit, chosen, targets)
            change.take_back()
            handle.applied = "restored"
        return carried_out(handle, edit)

    def _selected(self, edit: Any) -> tuple[Any, list[WeightMatrix], list[str]]:
        """The edit after it saw the model, what it changes, and the tensors that that lies in."""
        with self.processes.together("selecting the matrices of an edit"):
            settle(self.model)  # what a forward pass left gathered goes away, and what was read through it
            edit = prepared(edit, self)
            chosen = selected(self.model, edit)
        return edit, chosen, sorted({matrix.tensor_name for matrix in chosen})

    def _write(self, handle: Step, edit: Any, chosen: Sequence[WeightMatrix], targets: Sequence[str]) -> None:
        planned = rewrite(self.processes, edit.name, chosen, lambda matrix: edit.plan(matrix, self))
        matrices = {matrix.name for matrix in chosen if matrix.family != VECTOR_FAMILY}
        handle.planned.update({name: digest for name, digest in planned.items() if name in matrices})
        written = {matrix.tensor_name for matrix in chosen if matrix.name in planned}
        handle.left_alone = frozenset(targets) - written

    @contextmanager
    def _begun(self, name: str, kind: object, on_violation: str, step: int | None) -> Iterator[Step]:
        """The handle of a change that begins now; no other begins before its block ends."""
        handle: Step | None = None
        try:
            with self.processes.together(f"beginning {name!r}"):
                if self._closed:
                    raise InputError(f"{name!r} begins after this session was closed: make a new GuardSession")
                if self._open is not None:
                    raise InputError(f"edit {name!r} begins inside edit {self._open.name!r}: edits do not nest")
                if on_violation not in ON_VIOLATION:
                    raise InputError(f"on_violation must be one of {', '.join(ON_VIOLATION)}, not {on_violation!r}")
                if on_violation == "revert-worst" and kinds.parse_kind(kind).name == "train":
                    raise InputError(
                        "on_violation='revert-worst' is for edits: training moves all weights together with the "
                        "optimizer's state; use 'rollback'"
                    )
                handle = Step(name, len(self.history) + 1 if step is None else step, kinds.parse_kind(kind))
                handle.declared = kind is not None
                handle.monitor = on_violation == "monitor" or self.policy.mode == "monitor"
                self._open = handle
            # Whatever is raised on one process before the step is over, an interrupt too, is told to the others.
            with self.processes.together(f"step {name!r}"):
                yield handle
        finally:
            if self._open is handle:
                self._open = None

    # -- training ------------------------------------------------------------------------------

    def watch(self, rolling: Rolling | None = None, *, step: int = 0) -> None:
        """Keep the present state as the last good one of a training run, and none that is older.

        Args:
            rolling: The good states of the run and how it goes back to them; that of the call before if None, and
                of the weights alone at the first.
            step: Step of the run.
        """
        self.training.watch(rolling, step=step)

    def continue_from(self, values: Mapping[str, torch.Tensor], losses: Sequence[float]) -> None:
        """Write a state that was kept in files into the model, prove it, and take it as the baseline.

        Args:
            values: As `Snapshot.present` gave them.
            losses: Raw losses of the windows before, oldest first.

        Raises:
            InputError: They are of another model.
            RestoreError: They could not be proven in place.
        """
        self.guarded.put_in_place(values)
        self.training.losses = list(losses)

    def has_changed(self) -> bool:
        """Whether any tensor, on any process, is not as it was in the last good state (`watch` keeps one).

        Raises:
            InputError: Nobody watches.
        """
        return self.training.has_changed()

    def check_window(  # noqa: PLR0913 - what a window of training is known by
        self,
        *,
        step: int,
        raw_losses: Sequence[float] | None = None,
        grad_norms: Sequence[float] | None = None,
        num_skipped: int = 0,
        in_warmup: bool = False,
        impossible_moments: Sequence[str] = (),
        disagreements: Sequence[str] = (),
        guessing: float | None = None,
        update_size: float | None = None,
        reports: Sequence[WindowReport] = (),
        health: HealthReading | None = None,
        on_violation: str = "rollback",
        name: str = "train",
    ) -> Step:
        """Judge a window of ordinary training against the last good state.

        Healthy training moves outputs and spectra, so only invariants, finiteness, gross growth and
        the raw loss decide; the rest is reported. Kept: the present state becomes the last good one
        and the baseline. Rejected: the run goes back to the last good state, or to an older one where that
        is in doubt; after too many rollbacks, or where the processes' inputs disagree, the decision is HALT, with that
        state in place.

        Args:
            step: Global step.
            raw_losses: Unfiltered losses of the steps since the last check; those of many processes are averaged.
            grad_norms: Gradient norms of these steps.
            num_skipped: Steps since the last check that were left out for their gradients; their losses are not given.
            in_warmup: Whether the learning rate is still warming up.
            impossible_moments: What is wrong with the optimizer's state on this process, in words.
            disagreements: What is wrong with the batches of the processes, in words; the same on all of them.
            guessing: Loss of a model that guesses, nats per token: the logarithm of the number of symbols.
            update_size: Sum of the learning rates that these steps were taken with.
            reports: What else this process noted; it is put beside the verdicts, and judged by nobody.
            health: A report of training health made now (`HealthReport.reading()`), the same on all processes.
            on_violation: As in `edit`.
            name: Shown in the log.

        Raises:
            InputError: Nobody watches, or `raw_losses` holds what is not a number.
            RestoreError: If a restore could not be proven exact (the decision is then HALT).
        """
        with self._begun(name, "train", on_violation, step) as handle:
            seen = Window(
                raw_losses, grad_norms, num_skipped, in_warmup, impossible_moments, disagreements,
                guessing, update_size, reports, health,
            )  # fmt: skip
            window = self.training.judge(handle, seen, on_violation)
        if handle.decision is not None and handle.decision.action is Action.KEEP:
            self.training.learn(window)
        return handle

    # -- evidence ------------------------------------------------------------------------------

    def certificate(self) -> Certificate:
        """The statement over the model as it is now, with every step judged so far."""
        return evidence.certificate_of(self)

    # -- resume --------------------------------------------------------------------------------

    def save_state(self, folder: Path | str) -> None:
        """Write the sidecar files of a checkpoint (see `weightproof.transactions.guard_state`); rank 0 writes them.

        Raises:
            InputError: If the folder cannot be written.
        """
        assessor = self.guarded.assessor
        state = GuardState(
            baseline=self.baseline,
            current=self.guarded.present,
            losses=self.losses,
            outputs_stale=assessor.is_stale,
            steps=(*self._resumed, *(evidence.step_json(step) for step in self.history)),
            policy_digest=self.policy.digest,
            turns=assessor.turns.state,
        )
        with self.processes.together("saving the guard's state"):
            if self.processes.is_main:
                state.save(Path(folder))

    def load_state(self, folder: Path | str, *, step: int = 0) -> None:
        """Continue from sidecar files at a step of the run, after proving that the weights are those they describe.

        Later edits are still judged against the baseline of the first session, so that many small harms add up.
        The run may have had another number of processes when the files were written.

        Raises:
            BaselineError: If the files are missing, altered, or the model's weights differ.
        """
        state = from_main(self.processes, "the guard's state", lambda: GuardState.load(Path(folder)))
        if state.policy_digest != self.policy.digest and self.processes.is_main:
            logger.warning("the run resumes under another policy (%s) than it was begun with", self.policy.name)
        self.guarded.resume(state.baseline, state.current, outputs_stale=state.outputs_stale)
        self.guarded.assessor.turns = TrainingTurns(state.turns)
        self.training.losses = list(state.losses)
        self._resumed = list(state.steps)
        self.training.watch_on(step)

    def complete(self) -> Certificate | None:
        """Write the certificate of all steps so far and its report; None where no folder, or another process, has them.

        Raises:
            InputError: If they cannot be written.
        """
        return self._publisher.complete()

    def close(self) -> None:
        """Write what the certificate still lacks, free the last good snapshot, close the trackers.

        Nothing can be judged afterwards.

        Raises:
            InputError: If the certificate cannot be written; everything is freed and closed all the same.
        """
        try:
            if not self._closed and self.history:
                self.complete()
        finally:
            self._closed = True
            self.training.release()
            self._publisher.close()
            self.guarded.assessor.loss.close()
            self.processes.close()


def _policy_for(model: object, policy: str | Path | Policy) -> Policy:
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"GuardSession guards a torch.nn.Module, not {type(model).__name__}")
    return load_policy(policy)
