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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from weightproof import evidence, kinds
from weightproof.assessment import Assessor, Subject
from weightproof.baseline import Baseline
from weightproof.certificate import Certificate
from weightproof.equalisation import equalise, scales_for
from weightproof.errors import (
    BaselineError,
    EditRejectedError,
    InputError,
    RestoreError,
)
from weightproof.guard_state import STATE_FILE, GuardState
from weightproof.guards.corrections import Correction, apply_correction
from weightproof.guards.scope import Scope
from weightproof.judging import Judged
from weightproof.partial_revert import breaches, ranked, relative_changes, rounds, without
from weightproof.placements import settle
from weightproof.plans import rewrite
from weightproof.policy import Policy, load_policy
from weightproof.probes import State, common_matrices, looks_untrained, read_state
from weightproof.publisher import Publisher
from weightproof.rolling import GoodState, Rolling
from weightproof.session_checks import (
    as_losses,
    common_losses,
    loaded,
    parse_targets,
    processes_of,
    require_same,
    require_same_call,
    require_sound,
)
from weightproof.snapshot import Snapshot
from weightproof.spikes import HISTORY, is_high, is_loss_spike, lasting_score, norm_score
from weightproof.steps import Cost, MasterWeights, SafePoint, Step
from weightproof.tensor_readings import digest_of, digests_at, read_tensors
from weightproof.tensor_store import model_digest
from weightproof.trackers import Tracker
from weightproof.types import Action, Decision, WeightMatrix, WindowReading
from weightproof.weights import iter_tensors, iter_weight_matrices, unwrap

logger = logging.getLogger("weightproof")

ON_VIOLATION = ("rollback", "raise", "monitor", "revert-worst")
T = TypeVar("T")

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
        masters: fp32 copies that the optimizer writes back (DeepSpeed); `weightproof.attach` finds them.

    Raises:
        BaselineError: The model already holds NaN or inf, differs between processes, or `baseline` is of another
            model.
        CollectiveError: Another process failed, or did not come within `timeout`.
        InputError: `retain` is empty or unusable, an argument is unknown or of a wrong type, or processes were given
            different policies or data.
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
    ) -> None:
        self.processes = processes_of(accelerator, timeout)
        self.cost = Cost()
        self._history: list[Step] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._open: Step | None = None
        self.rolling: Rolling | None = None
        self._held: State | None = None
        self._closed = False
        self._resumed: list[Any] = []
        try:
            with self.processes.together("making the guard session"):
                self._take(model, policy, retain, target, tokenizer_digest)
                self.output_dir = Path(output_dir) if output_dir is not None else None
                self.snapshot_dir = Path(snapshot_dir) if snapshot_dir is not None else None
                self.masters = masters
                settings = self._settings()
            advice = "Give every process the same (retain data before it is sharded over processes, for example)"
            require_same(self.processes, "settings of the guard", settings, advice)
            self._begin(baseline, trackers, accelerator)
        except BaseException:
            self.processes.close()  # nobody holds this session: its connections and threads would stay
            raise

    def _begin(
        self, baseline: Baseline | Path | str | None, trackers: Sequence[Tracker | str] | None, accelerator: Any
    ) -> None:
        """Read the baseline, open the trackers."""
        started = time.perf_counter()
        with self.processes.together("capturing the baseline"):
            self.baseline = self._capture_baseline(baseline)
        self._current = State(self.baseline.readings, self.baseline.fits)
        self.cost.baseline_seconds = time.perf_counter() - started
        self.cost.baseline_bytes = evidence.baseline_bytes(self.baseline, self._assessor.cache)
        self._publisher = Publisher(self.processes, self.certificate, trackers, self.output_dir, accelerator)

    def _take(
        self, model: torch.nn.Module, policy: str | Path | Policy, retain: Any, target: Any, tokenizer: str | None
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"GuardSession guards a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self.policy = load_policy(policy)
        self._assessor = Assessor(model, self.policy, retain, self.processes, target=target, tokenizer_digest=tokenizer)

    def _settings(self) -> dict[str, str]:
        """What must be the same on every process, in words."""
        return {
            "policy": f"{self.policy.name} ({self.policy.digest[:12]})",
            "windows": ", ".join(f"{w.name} ({w.digest[:12]})" for w in self.windows) or "none",
            "model class": type(unwrap(self.model)).__name__,
            "number of tensors": str(sum(1 for _ in iter_tensors(self.model))),
            "master weights": "none" if self.masters is None else type(self.masters).__name__,
        }

    # -- baseline ------------------------------------------------------------------------------

    def _capture_baseline(self, given: Baseline | Path | str | None) -> Baseline:
        self._assessor.forward_digest()  # settles buffers that a forward pass rewrites, before they are read
        if given is not None:
            baseline = self._from_main("the baseline", lambda: loaded(given))
            baseline.require_same_model(read_tensors(self.model, {}, (), self.processes))
        else:
            state = read_state(self.model, processes=self.processes, progress=True)
            baseline = Baseline(state.readings, state.fits, evidence.environment(self.model), evidence.now())
        require_sound(baseline.readings.tensors)
        if looks_untrained(baseline.readings) and self.processes.is_main:
            logger.warning(
                "the model looks untrained, as it should before training from scratch: every spectrum is a pure "
                "Marchenko-Pastur bulk. If it was trained before, check that its weights were really loaded"
            )
        self._assessor.capture_outputs()
        return baseline

    def _from_main(self, what: str, read: Callable[[], T]) -> T:
        """What rank 0 read, on every rank: a folder may exist on its machine only."""
        with self.processes.together(f"reading {what}"):
            found = read() if self.processes.is_main else None
        return cast("T", self.processes.broadcast(what, found))

    @property
    def history(self) -> tuple[Step, ...]:
        """Every judged step, oldest first."""
        return tuple(self._history)

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers that are open on this process: none on any but rank 0."""
        return self._publisher.trackers

    @property
    def model_digest(self) -> str:
        """SHA-256 over the per-tensor digests of the last accepted state of the model."""
        return self._current.readings.model_digest

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
            kind: What the edit claims to be: None ("unknown"), "train", "preserving", or an object of
                `weightproof.kinds` such as `Quantize(8)`; its contract is checked.
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
            self._refresh_baseline()
            point = self._safe_point()
            subject = Subject(handle.name, handle.kind, declared)
            try:
                subject = self._with_strays(subject, point.snapshot)
                self._capture_losses(subject)
                with self.processes.together(f"edit {name!r}"):
                    yield handle
                subject = replace(subject, planned=handle.planned)
                state = self._judge(handle, point.snapshot, self._present, subject)
                subject, state = self._equalised(handle, point.snapshot, subject, state)
                if on_violation == "revert-worst" and not handle.monitor:
                    state = self._revert_worst(handle, point.snapshot, subject, state)
            except BaseException:
                # Whatever went wrong, in the block, in measuring or in drawing: the model goes back as it was.
                self._restore(point)
                point.snapshot.discard()
                raise
            self._settle(handle, point, state, on_violation)

    def apply(self, edit: Any, *, on_violation: str = "rollback", step: int | None = None) -> Step:
        """Plan an edit, write it, and judge it; see `weightproof.edits`.

        Raises:
            InputError: If the edit selects no matrix of this model.
        """
        with self.processes.together("selecting the matrices of an edit"):
            readable = [matrix for matrix in iter_weight_matrices(self.model) if matrix.refusal is None]
            selected = [matrix for matrix in readable if edit.selects(matrix)]
            if not selected:
                families = ", ".join(sorted({matrix.family for matrix in readable})) or "(none)"
                raise InputError(
                    f"edit {edit.name!r} selects no weight matrix of this model: check include= and exclude= (its "
                    f"matrices are of the families {families}; a family is chosen by its exact name)"
                )
        targets = sorted({matrix.tensor_name for matrix in selected})
        with self.edit(edit.name, edit.kind, targets, on_violation, step=step) as handle:
            planned = rewrite(self.processes, edit.name, selected, lambda matrix: edit.plan(matrix, self))
            handle.planned.update(planned)
        return handle

    # -- training ------------------------------------------------------------------------------

    def watch(self, rolling: Rolling | None = None, *, step: int = 0) -> None:
        """Keep the present state as the last good one of a training run, and none that is older.

        Args:
            rolling: The good states of the run and how it goes back to them; that of the call before if None, and
                of the weights alone at the first.
            step: Step of the run.
        """
        if self.rolling is not None:
            self.rolling.restart()
        self.rolling = rolling or self.rolling or Rolling()
        self._remember(step)

    def _remember(self, step: int) -> None:
        """The present state becomes the last good one (every process its own part)."""
        rolling = self.rolling
        if rolling is None:
            return
        rolling.make_room()
        point = self._safe_point()
        with self.processes.together("keeping the training state"):
            training = None if rolling.capture is None else rolling.capture()
        state = GoodState(point, training, self._current, self.baseline, step)
        rolling.push(state, lambda size: max(self.processes.gather("size of the good states", size)))
        self.cost.snapshot_bytes = max(self.cost.snapshot_bytes, rolling.nbytes)

    @property
    def losses(self) -> tuple[float, ...]:
        """Raw losses of the last windows that were kept, oldest first."""
        return tuple(self._losses)

    def continue_from(self, values: Mapping[str, torch.Tensor], losses: Sequence[float]) -> None:
        """Write a state that was kept in files into the model, prove it, and take it as the baseline.

        Args:
            values: As `Snapshot.present` gave them.
            losses: Raw losses of the windows before, oldest first.

        Raises:
            InputError: They are of another model.
            RestoreError: They could not be proven in place.
        """
        with self.processes.together("continuing from a kept state"):
            kept = {} if self.masters is None else self.masters.tensors()
            snapshot = Snapshot.of_values(self.model, values, kept)
            snapshot.restore()
            snapshot.discard()
        with self.processes.together("capturing the baseline"):
            self.baseline = self._capture_baseline(None)
        self._current = State(self.baseline.readings, self.baseline.fits)
        self._losses = list(losses)

    def has_changed(self) -> bool:
        """Whether any tensor, on any process, is not as it was in the last good state (`watch` keeps one).

        Raises:
            InputError: Nobody watches.
        """
        with self.processes.together("comparing with the last good state"):
            good = None if self.rolling is None else self.rolling.newest
            if good is None:
                raise InputError("has_changed needs a last good state: call session.watch() when training begins")
            settle(self.model)
            ours = bool(good.point.snapshot.changed_names())
        return any(self.processes.gather("changed since the last good state", ours))

    def check_window(  # noqa: PLR0913 - what a window of training is known by
        self,
        *,
        step: int,
        raw_losses: Sequence[float] | None = None,
        grad_norms: Sequence[float] | None = None,
        num_skipped: int = 0,
        in_warmup: bool = False,
        on_violation: str = "rollback",
        name: str = "train",
    ) -> Step:
        """Judge a window of ordinary training against the last good state.

        Healthy training moves outputs and spectra, so only invariants, finiteness, gross growth and
        the raw loss decide; the rest is reported. Kept: the present state becomes the last good one
        and the baseline. Rejected: the run goes back to the last good state, or to an older one where that
        is in doubt; after too many rollbacks the decision is HALT, with that state in place.

        Args:
            step: Global step.
            raw_losses: Unfiltered losses of the steps since the last check; those of many processes are averaged.
            grad_norms: Gradient norms of these steps.
            num_skipped: Steps since the last check that were left out for their gradients; their losses are not given.
            in_warmup: Whether the learning rate is still warming up.
            on_violation: As in `edit`.
            name: Shown in the log.

        Raises:
            InputError: Nobody watches, or `raw_losses` holds what is not a number.
            RestoreError: If a restore could not be proven exact (the decision is then HALT).
        """
        with self._begun(name, "train", on_violation, step) as handle:
            with self.processes.together(f"losses of {name!r}"):
                if self.rolling is None or (good := self.rolling.newest) is None:
                    raise InputError("check_window needs a last good state: call session.watch() when training begins")
                ours, our_norms = as_losses(raw_losses), as_losses(grad_norms)
            require_same_call(self.processes, handle, on_violation, in_warmup=in_warmup)
            losses = common_losses(ours, self.processes)
            # Whole gradients have one norm; where one process steps and another does not, the weights show it.
            every = self.processes.gather("gradient norms", (our_norms, num_skipped))
            norms, skipped = every[0][0], max(count for _, count in every)
            subject = Subject(
                name,
                handle.kind,
                None,
                raw_losses=losses,
                loss_spike=None if losses is None else is_loss_spike(self._losses, losses),
                in_warmup=in_warmup,
                window=self._window_reading(losses or (), norms, skipped),
            )
            state = self._judge(handle, good.point.snapshot, self._current, subject)
            self._settle(handle, good.point, state, on_violation, window=True)
        if handle.decision is not None and handle.decision.action is Action.KEEP:
            self._losses = [*self._losses, *(losses or ())][-HISTORY:]
            self._norms = [*self._norms, *(norms or ())][-HISTORY:]
        return handle

    def _window_reading(
        self, losses: Sequence[float], norms: tuple[float, ...] | None, num_skipped: int
    ) -> WindowReading:
        loss, norm = lasting_score(self._losses, losses), norm_score(self._norms, norms or ())
        stale: set[str] = set()
        if self.masters is not None:
            for theirs in self.processes.gather("stale master weights", sorted(self.masters.stale())):
                stale.update(theirs)
        return WindowReading(
            grad_norms=norms,
            num_skipped=num_skipped,
            loss_z=None if loss is None else loss.z,
            loss_ratio=None if loss is None else loss.ratio,
            loss_rise=None if loss is None else loss.rise,
            norm_z=None if norm is None else norm.z,
            norm_ratio=None if norm is None else norm.ratio,
            stale_masters=tuple(sorted(stale)),
        )

    # -- the transaction -----------------------------------------------------------------------

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
                handle = Step(name, len(self._history) + 1 if step is None else step, kinds.parse_kind(kind))
                handle.monitor = on_violation == "monitor" or self.policy.mode == "monitor"
                self._open = handle
            # Whatever is raised on one process before the step is over, an interrupt too, is told to the others.
            with self.processes.together(f"step {name!r}"):
                yield handle
        finally:
            if self._open is handle:
                self._open = None

    @property
    def _present(self) -> State:
        """Readings of the weights that the last judged change left, though they may await the next window."""
        return self._held or self._current

    def _safe_point(self) -> SafePoint:
        started = time.perf_counter()
        with self.processes.together("taking a snapshot"):
            # The forward pass comes first: some models rewrite a buffer in it (rotary tables that follow the length).
            forward = self._assessor.forward_digest()
            settle(self.model)
            kept = self.masters.tensors() if self.masters is not None else {}
            snapshot = Snapshot.capture(self.model, self.snapshot_dir, kept)
        point = SafePoint(snapshot, forward)
        self.cost.snapshot_seconds += time.perf_counter() - started
        self.cost.snapshot_bytes = max(self.cost.snapshot_bytes, snapshot.nbytes)
        return point

    def _refresh_baseline(self) -> None:
        """Read the baseline whole again after training moved it: windows refresh only a share of the spectra.

        Left alone when the weights are not those last accepted; then the edit is judged against the older one.
        """
        if not self._assessor.is_stale:
            return
        tensors = read_tensors(self.model, {}, (), self.processes)
        if digest_of(tensors) != self.model_digest:
            return
        started = time.perf_counter()
        try:
            self._assessor.capture_outputs()
        except BaselineError as error:
            # Only a run that is monitored keeps broken weights: it is told, and judged by the last sound baseline.
            logger.warning("the baseline stays as it was before training moved the model: %s", error)
            return
        self._current = read_state(self.model, tensors, processes=self.processes, progress=True)
        self.baseline = replace(self.baseline, readings=self._current.readings, fits=self._current.fits)
        self.cost.baseline_seconds += time.perf_counter() - started

    def _with_strays(self, subject: Subject, snapshot: Snapshot) -> Subject:
        """Note the tensors that changed since the last accepted state, outside of any guarded change."""
        known = self._present.readings.tensors
        with self.processes.together("digests of the snapshot"):
            digests = digests_at(snapshot, self.model, self.processes)
        # A copy that was not that of rank 0 (a buffer that training moved) has no known digest: it is not compared.
        own = {name for name, reading in known.items() if self.processes.rank in reading.differing_ranks}
        differing = {name for name, digest in digests.items() if name not in known or known[name].digest != digest}
        ours = sorted((differing - own) | (known.keys() - digests.keys()))
        stray = frozenset().union(*self.processes.gather("tensors changed outside of an edit", ours))
        if not stray:
            return subject
        shown = ", ".join(sorted(stray)[:3])
        logger.warning(
            "tensors changed outside of any guarded edit: %d (%s); they are judged with this one", len(stray), shown
        )
        # Hashing the whole state is spared where it is known to be the one that was read before.
        before = self.processes.broadcast("digest before the edit", model_digest(digests))
        return replace(subject, stray=stray, digest_before=before)

    def _capture_losses(self, subject: Subject) -> None:
        """Read the losses before the first edit, or the first after training: only edits are judged by them.

        Where weights changed unseen, their losses are no reference: the loss is not measured then.
        """
        if subject.stray or subject.kind.name == "train":
            return
        started = time.perf_counter()
        self._assessor.capture_losses()
        self.cost.baseline_seconds += time.perf_counter() - started

    def _judge(self, handle: Step, snapshot: Snapshot, current: State, subject: Subject) -> State:
        """Read and judge the model as it is now; `current` are the readings of the state in `snapshot`."""
        started = time.perf_counter()
        with self.processes.together(f"judging {handle.name!r}"):
            result = self._assessor.assess(snapshot, current, self.baseline, subject, handle.step)
            fixes = self._assessor.corrections(self.baseline, result.state.readings)
            if fixes:
                corrected = self._correct(fixes)
                subject = replace(subject, planned={}, corrected=corrected)
                result = self._assessor.assess(snapshot, current, self.baseline, subject, handle.step)
            handle.settle(result.decision, result.judged)
            self._publisher.draw(handle, self.model, self.baseline)
        handle.seconds = time.perf_counter() - started
        self.cost.check_seconds += handle.seconds
        self.cost.checks += 1
        return result.state

    def _equalised(self, handle: Step, snapshot: Snapshot, subject: Subject, state: State) -> tuple[Subject, State]:
        """Variance equalisation of an edit, where the policy asks for it and the loss gains; judged again then."""
        limits, record = self._assessor.limits["variance"], handle.record
        if not limits.equalise or handle.monitor or record is None or handle.kind.name == "train":
            return subject, state
        scope = Scope(self.baseline.readings)
        matrices = [
            one
            for one in common_matrices(self.model, self.processes)
            if subject.targets is None or scope.covers(one.tensor_name, subject.targets)
        ]
        moments = self._assessor.cache.second_moments if self._assessor.cache else {}
        scales = scales_for(moments, state.readings.second_moments, matrices, limits)
        if not scales:
            return subject, state
        probe, processes = self._assessor.loss, self.processes
        done = equalise(self.model, scales, probe, limits.equalise_min_effect, processes)
        logger.info("variance equalisation of %s: %s", handle.name, done.reason)
        if not done.kept:
            return subject, state
        scaled = {name for scale in scales for name in scale.matrices}
        subject = replace(
            subject,
            planned={name: digest for name, digest in subject.planned.items() if name not in scaled},
            corrected=(*record.corrections, *done.corrections),
            contract=record.contract,  # what the edit was, before it was scaled
        )
        spent = handle.seconds
        state = self._judge(handle, snapshot, self._present, subject)
        handle.seconds += spent
        return subject, state

    def _revert_worst(self, handle: Step, snapshot: Snapshot, subject: Subject, state: State) -> State:
        """Take back the worst of a rejected edit, a little more in each round, until the rest of it is kept.

        Where nothing passes the decision on the whole edit stands, and `_settle` restores everything.
        """
        rejected, reverted = (handle.decision, handle.judged), frozenset[str]()
        spectra = handle.spectra
        for names in self._blamed(handle, snapshot):
            if handle.decision is None or handle.decision.action is not Action.ROLLBACK:
                return state
            with self.processes.together(f"reverting a part of {handle.name!r}"):
                snapshot.restore_tensors(names)
            reverted |= names
            left, spent = without(subject, reverted), handle.seconds
            state = self._judge(handle, snapshot, self._present, left)
            handle.seconds += spent
        if handle.decision is not None and handle.decision.action is Action.ROLLBACK and reverted:
            handle.settle(*cast("tuple[Decision, Judged]", rejected))
            handle.spectra = spectra
        return state

    def _blamed(self, handle: Step, snapshot: Snapshot) -> Iterator[frozenset[str]]:
        """Names of the tensors to take back in each round, the same on every process."""
        if handle.decision is None or handle.decision.action is not Action.ROLLBACK or handle.record is None:
            return
        changed = frozenset(handle.record.changed_names)
        ours = bool(snapshot.replaced_modules() or snapshot.displaced(changed))
        if any(self.processes.gather("what can be reverted in part", ours)):
            return  # modules or objects were replaced: only the whole snapshot puts them back
        moved = relative_changes(self.model, snapshot, changed, self.processes)
        errors = self._assessor.block_errors()
        moved = {name: change for name, change in moved.items() if change > 0.0}
        groups = ranked(self.model, moved, errors, breaches(handle.verdicts))
        for chosen in rounds(groups):
            yield frozenset(name for group in chosen for name in group.tensors)

    def _correct(self, fixes: Sequence[tuple[Correction, str]]) -> tuple[str, ...]:
        """Write each correction once, tied copies with it; returns what was done, in words."""
        asked = {correction.name: (correction, mode) for correction, mode in fixes}

        def plan(matrix: WeightMatrix) -> torch.Tensor:
            return apply_correction(matrix.load(), *asked[matrix.name])

        matrices = [matrix for matrix in iter_weight_matrices(self.model) if matrix.name in asked]
        rewrite(self.processes, "corrections", matrices, plan)
        return tuple(f"{mode} {correction.name}" for correction, mode in fixes)

    def _settle(self, handle: Step, point: SafePoint, state: State, on_violation: str, *, window: bool = False) -> None:
        decision = handle.decision
        if decision is None:
            raise InputError(f"step {handle.name!r} was not judged")
        keep = decision.action is Action.KEEP or handle.monitor
        handle.applied = "kept" if keep else "restored"
        if keep:
            if not window:
                self._refresh_masters(handle, point)
            kept = decision.action is Action.KEEP
            self._accept(state, handle, window=window, trained=kept and handle.kind.name == "train", spiked=not kept)
        else:
            try:
                if window:
                    self._go_back(handle, decision)
                else:
                    self._restore(point)
            except RestoreError as error:
                handle.applied = "not restored"
                handle.decision = self._assessor.halted(decision, str(error))
                self._publish(handle)
                raise
        if not window:
            point.snapshot.discard()
        self._publish(handle)
        if on_violation == "raise" and not keep:
            raise EditRejectedError(f"{handle.name} was rolled back: {decision.reason}")

    def _go_back(self, handle: Step, decision: Decision) -> None:
        """Take the run back to a good state, with all that belongs to it; HALT where that was done too often."""
        if self.rolling is None:
            raise InputError("nobody watches: there is no good state to go back to")
        losses = () if handle.judged is None else handle.judged.after.raw_losses or ()
        # The first loss of a window is that of the state it began with.
        doubtful = bool(losses) and is_high(self._losses, losses[0])
        good = self.rolling.choose(handle.step, decision.reason, doubtful=doubtful)
        self._restore(good.point)
        notes: dict[str, Any] = {"back_to_step": good.step, "rollbacks": len(self.rolling.rollbacks)}
        if good.training is not None and not self.processes.lost:
            with self.processes.together("restoring the training state"):
                notes.update(good.training.put_back())
        self._held, self._current, self.baseline = None, good.current, good.baseline
        if handle.record is not None:
            handle.record = replace(handle.record, params={**handle.record.params, **notes})
        if self.rolling.exhausted and decision.action is not Action.HALT:
            reason = f"{decision.reason}. {self.rolling.tried()}"
            handle.decision = self._assessor.halted(decision, reason, situation="rollbacks_exhausted")

    def _refresh_masters(self, handle: Step, point: SafePoint) -> None:
        """Write a kept edit into the optimizer's copies; half written ones go back with the weights."""
        if self.masters is None or handle.record is None:
            return
        try:
            with self.processes.together("writing the optimizer's master weights"):
                self.masters.refresh(handle.record.changed_names)
                if stale := sorted(set(self.masters.stale()) & set(handle.record.changed_names)):
                    raise RestoreError(
                        f"the optimizer's master weights did not take {handle.name!r}, so its next step would undo it: "
                        f"{', '.join(stale[:3])} ({len(stale)} tensors); the edit was taken back"
                    )
        except BaseException:
            handle.applied = None
            self._restore(point)
            raise

    def _accept(self, state: State, handle: Step, *, window: bool, trained: bool, spiked: bool) -> None:
        if window and self._held is None and not spiked and (self._grew_untrained(state) or self._ends_high(handle)):
            # Growth of an unlearned matrix proves nothing until a loss has been seen with it, and one high loss
            # may be a batch or the beginning of something: keep the older last good state for one more window.
            self._held = state
            return
        self._held, self._current = None, state
        if window or trained:
            self.baseline = replace(self.baseline, readings=state.readings, fits=state.fits)
            self._assessor.outputs_moved()
        if self.rolling is None:
            return
        if window:
            self.rolling.kept()
            self._remember(handle.step)
        else:
            self.watch(step=handle.step)  # no later rollback may undo a kept edit

    def _ends_high(self, handle: Step) -> bool:
        """Whether the last loss of a window that is kept was far too high."""
        losses = () if handle.judged is None else handle.judged.after.raw_losses or ()
        return bool(losses) and is_high(self._losses, losses[-1])

    def _grew_untrained(self, state: State) -> bool:
        """Whether a matrix without learned structure changed its norm grossly."""
        before, after = self.baseline.readings.matrices, state.readings.matrices
        for name in state.readings.untrained & before.keys():
            old, new = before[name].spectral_norm, after[name].spectral_norm
            if old and new is not None and not 0.1 <= new / old <= 10.0:
                return True
        return False

    def _restore(self, point: SafePoint) -> None:
        """Put this process's part back; proven by digests, and by a forward pass while the others are there."""
        if self.processes.lost:
            point.put_back()
            return
        with self.processes.together("restoring the snapshot"):
            point.put_back()
        with self.processes.together("proving the restore"):
            self._assessor.prove_forward(point.forward)

    # -- evidence ------------------------------------------------------------------------------

    def _publish(self, handle: Step) -> None:
        """Record a judged step: history, then the certificate file, then the trackers."""
        self._history.append(handle)
        # All readings of a step take room: kept of this one and of the one that made the present weights.
        present = next((step for step in reversed(self._history) if step.applied == "kept"), handle)
        for step in self._history:
            if step is not handle and step is not present:
                step.judged = None
        self._publisher.publish(handle)

    def certificate(self) -> Certificate:
        """The statement over the model as it is now, with every step judged so far."""
        return evidence.certificate_of(self)

    @property
    def current(self) -> State:
        """Readings of the last accepted state of the model."""
        return self._current

    @property
    def resumed_steps(self) -> tuple[Any, ...]:
        """Steps judged before a resume, as the certificate carries them."""
        return tuple(self._resumed)

    @property
    def windows(self) -> tuple[Any, ...]:
        """The windows on which outputs are compared (random tokens, then `retain`), then those of the loss."""
        return (*self._assessor.windows, *self._assessor.loss.windows)

    # -- resume --------------------------------------------------------------------------------

    def save_state(self, folder: Path | str) -> None:
        """Write the sidecar files of a checkpoint (see `weightproof.guard_state`); rank 0 writes them.

        Raises:
            InputError: If the folder cannot be written.
        """
        current = self._present
        state = GuardState(
            baseline=self.baseline,
            current=current,
            losses=tuple(self._losses),
            outputs_stale=self._assessor.is_stale,
            steps=(*self._resumed, *(evidence.step_json(step) for step in self._history)),
            policy_digest=self.policy.digest,
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
        state = self._from_main("the guard's state", lambda: GuardState.load(Path(folder)))
        if state.policy_digest != self.policy.digest and self.processes.is_main:
            logger.warning("the run resumes under another policy (%s) than it was begun with", self.policy.name)
        readings = read_tensors(self.model, {}, (), self.processes)
        Baseline(state.current.readings, {}, {}, "").require_same_model(readings)
        self.baseline = state.baseline
        self._held, self._current = None, state.current
        self._losses = list(state.losses)
        self._resumed = list(state.steps)
        if state.outputs_stale:
            self._assessor.outputs_moved()
        else:
            self._assessor.capture_outputs()
        if self.rolling is not None:
            self.watch(step=step)

    def close(self) -> None:
        """Write what the certificate still lacks, free the last good snapshot, close the trackers.

        Nothing can be judged afterwards.

        Raises:
            InputError: If the certificate cannot be written; everything is freed and closed all the same.
        """
        try:
            if not self._closed and self._history:
                self._publisher.complete(self._history[-1])
        finally:
            self._release()

    def _release(self) -> None:
        self._closed = True
        if self.rolling is not None:
            self.rolling.restart()
            self.rolling = None
        self._publisher.close()
        self._assessor.loss.close()
        self.processes.close()
