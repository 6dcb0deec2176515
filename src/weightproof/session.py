"""The guard session: every change of the weights becomes a transaction with evidence.

begin (snapshot) -> change (any code) -> measure -> judge -> keep, or restore and prove it.

Edits are judged against the baseline, so that many small harms add up; what an edit declared is
judged against the state just before it. A window of ordinary training (`check_window`, or an edit of
kind "train") is judged against the last good state and, when kept, becomes the new baseline.

    >>> session = GuardSession(model, policy="balanced")           # doctest: +SKIP
    >>> with session.edit("int8") as step:                          # doctest: +SKIP
    ...     quantize_(model)
    >>> step.decision.action, step.applied                          # doctest: +SKIP
    (<Action.KEEP: 'KEEP'>, 'kept')
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weightproof import evidence, kinds
from weightproof.assessment import Assessor, Subject
from weightproof.baseline import Baseline
from weightproof.certificate import Certificate
from weightproof.errors import BaselineError, EditRejectedError, InputError, RestoreError, WeightproofError
from weightproof.files import write_atomically
from weightproof.guards.corrections import Correction, apply_correction
from weightproof.policy import Policy, load_policy
from weightproof.probes import State, digest_of, looks_untrained, read_state, read_tensors
from weightproof.snapshot import Snapshot, tensor_digest, write_matrix
from weightproof.spikes import MEMORY, is_loss_spike
from weightproof.steps import Cost, SafePoint, Step
from weightproof.trackers import Tracker, open_trackers
from weightproof.types import Action, TensorReading
from weightproof.weights import iter_weight_matrices

logger = logging.getLogger("weightproof")

STATE_FILE = "guard_state.json"
STATE_FORMAT = "weightproof-state-v1"
CURRENT_FILE = "guard_current.safetensors"
ON_VIOLATION = ("rollback", "raise", "monitor")


class GuardSession:
    """Guards one model over a series of changes.

    Args:
        model: Any `torch.nn.Module`; wrappers (DDP, compile, PEFT) are looked through.
        policy: Tier name (conservative, balanced, aggressive), path of a policy file, or `Policy`.
        retain: Data on which the model must not get worse: an iterable of dicts with `input_ids`
            (a `datasets.Dataset` too), of tensors, or of token lists. Without it random tokens
            decide, with assurance `outputs-only`.
        target: Data on which an edit promises a gain; kept for the loss guard, which this version
            does not have: giving it is an error rather than silently unused.
        accelerator: `accelerate.Accelerator` of the run, if any.
        trackers: Trackers, or their registered names ("jsonl", "wandb").
        output_dir: Folder for the certificate and the JSONL log; nothing is written without it.
        baseline: A `Baseline` (or its path) captured earlier from this very model.
        snapshot_dir: Keep snapshots in this folder instead of in memory.

    Raises:
        BaselineError: The model already holds NaN or inf, or `baseline` is of another model.
        InputError: `retain` is empty or unusable, or an argument is unknown or of a wrong type.
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
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"GuardSession guards a torch.nn.Module, not {type(model).__name__}")
        if target is not None:
            raise InputError("target= needs the loss guard, which this version does not have; pass retain= only")
        if (world_size := _world_size(accelerator)) > 1:
            raise InputError(f"this version guards one process, not {world_size}: ranks are not compared yet")
        self.model = model
        self.policy = load_policy(policy)
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.snapshot_dir = Path(snapshot_dir) if snapshot_dir is not None else None
        self.cost = Cost()
        self._history: list[Step] = []
        self._losses: list[float] = []
        self._open: Step | None = None
        self._last_good: SafePoint | None = None
        self._held: State | None = None
        self._closed = False
        self._picture: bytes | None = None
        self._resumed: list[Any] = []
        started = time.perf_counter()
        self._assessor = Assessor(model, self.policy, retain)
        self.baseline = self._capture_baseline(baseline)
        self._current = State(self.baseline.readings, self.baseline.fits)
        self.cost.baseline_seconds = time.perf_counter() - started
        self.cost.baseline_bytes = evidence.baseline_bytes(self.baseline, self._assessor.cache)
        self.trackers = open_trackers(trackers, self.output_dir)

    # -- baseline ------------------------------------------------------------------------------

    def _capture_baseline(self, given: Baseline | Path | str | None) -> Baseline:
        self._assessor.forward_digest()  # settles buffers that a forward pass rewrites, before they are read
        if given is not None:
            baseline = given if isinstance(given, Baseline) else Baseline.load(given)
            baseline.require_same_model(read_tensors(self.model, {}, ()))
        else:
            state = read_state(self.model, progress=True)
            baseline = Baseline(state.readings, state.fits, evidence.environment(self.model), evidence.now())
        _require_finite(baseline.readings.tensors)
        if looks_untrained(baseline.readings):
            logger.warning(
                "the model looks untrained, as it should before training from scratch: every spectrum is a pure "
                "Marchenko-Pastur bulk. If it was trained before, check that its weights were really loaded"
            )
        self._assessor.capture_outputs()
        return baseline

    @property
    def history(self) -> tuple[Step, ...]:
        """Every judged step, oldest first."""
        return tuple(self._history)

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
                "monitor" only reports.
            step: Number to log; counts up by default.

        Raises:
            EditRejectedError: With `on_violation="raise"`, after the rejected change was restored.
            RestoreError: If a restore could not be proven exact (the decision is then HALT).
            SnapshotError: If no snapshot can be taken; the block is not entered.
        """
        handle = self._begin(name, kind, on_violation, step)
        try:
            declared = _parse_targets(targets)
            self._refresh_baseline()
            point = self._safe_point()
            stray = self._stray_names(point.snapshot)
            try:
                yield handle
                subject = Subject(handle.name, handle.kind, declared, planned=handle.planned, stray=stray)
                state = self._judge(handle, point.snapshot, self._present, subject)
            except BaseException:
                # Whatever went wrong, in the block, in measuring or in drawing: the model goes back as it was.
                self._restore(point)
                point.snapshot.discard()
                raise
            self._settle(handle, point, state, on_violation)
        finally:
            self._open = None

    def apply(self, edit: Any, *, on_violation: str = "rollback", step: int | None = None) -> Step:
        """Plan an edit, write it, and judge it; see `weightproof.edits`.

        Raises:
            InputError: If the edit selects no matrix of this model.
        """
        selected = [m for m in iter_weight_matrices(self.model) if m.refusal is None and edit.selects(m)]
        if not selected:
            families = sorted({matrix.family for matrix in iter_weight_matrices(self.model) if matrix.refusal is None})
            raise InputError(
                f"edit {edit.name!r} selects no weight matrix of this model: check include= and exclude= (its matrices "
                f"are of the families {', '.join(families) or '(none)'}; a family is chosen by its exact name)"
            )
        targets = sorted({matrix.tensor_name for matrix in selected})
        with self.edit(edit.name, edit.kind, targets, on_violation, step=step) as handle:
            for matrix in selected:
                planned = edit.plan(matrix, self)
                if planned is not None:
                    handle.planned[matrix.name] = tensor_digest(planned.to(matrix.dtype))
                    write_matrix(matrix, planned)
        return handle

    # -- training ------------------------------------------------------------------------------

    def watch(self) -> None:
        """Keep the present weights as the last good state of a training run."""
        if self._last_good is not None:
            self._last_good.snapshot.discard()
        self._last_good = self._safe_point()

    def check_window(
        self,
        *,
        step: int,
        raw_losses: Sequence[float] | None = None,
        in_warmup: bool = False,
        on_violation: str = "rollback",
        name: str = "train",
    ) -> Step:
        """Judge a window of ordinary training against the last good state.

        Healthy training moves outputs and spectra, so only invariants, finiteness, gross growth and
        the raw loss decide; the rest is reported. Kept: the present state becomes the last good one
        and the baseline. Rejected: the weights go back to the last good state.

        Args:
            step: Global step.
            raw_losses: Unfiltered losses of the steps since the last check.
            in_warmup: Whether the learning rate is still warming up.
            on_violation: As in `edit`.
            name: Shown in the log.

        Raises:
            InputError: Nobody watches, or `raw_losses` holds what is not a number.
            RestoreError: If a restore could not be proven exact (the decision is then HALT).
        """
        if self._last_good is None:
            raise InputError("check_window needs a last good state: call session.watch() when training begins")
        try:
            losses = None if raw_losses is None else tuple(float(loss) for loss in raw_losses)
        except (TypeError, ValueError) as error:
            raise InputError(f"raw_losses must be one number a step: {error}") from error
        handle = self._begin(name, "train", on_violation, step)
        point = self._last_good
        try:
            spike = None if losses is None else is_loss_spike(self._losses, losses)
            subject = Subject(name, handle.kind, None, raw_losses=losses, loss_spike=spike, in_warmup=in_warmup)
            state = self._judge(handle, point.snapshot, self._current, subject)
            self._settle(handle, point, state, on_violation, window=True)
        finally:
            self._open = None
        if handle.decision is not None and handle.decision.action is Action.KEEP:
            self._losses = [*self._losses, *(losses or ())][-MEMORY:]
        return handle

    # -- the transaction -----------------------------------------------------------------------

    def _begin(self, name: str, kind: object, on_violation: str, step: int | None) -> Step:
        if self._closed:
            raise InputError(f"{name!r} begins after this session was closed: make a new GuardSession of the model")
        if self._open is not None:
            raise InputError(f"edit {name!r} begins inside edit {self._open.name!r}: edits do not nest")
        if on_violation not in ON_VIOLATION:
            raise InputError(f"on_violation must be one of {', '.join(ON_VIOLATION)}, not {on_violation!r}")
        handle = Step(name, len(self._history) + 1 if step is None else step, kinds.parse_kind(kind))
        handle.monitor = on_violation == "monitor"
        self._open = handle
        return handle

    @property
    def _present(self) -> State:
        """Readings of the weights that the last judged change left, though they may await the next window."""
        return self._held or self._current

    def _safe_point(self) -> SafePoint:
        started = time.perf_counter()
        # The forward pass comes first: some models rewrite a buffer in it (rotary tables that follow the length).
        forward = self._assessor.forward_digest()
        snapshot = Snapshot.capture(self.model, self.snapshot_dir)
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
        tensors = read_tensors(self.model, {}, ())
        if digest_of(tensors) != self.model_digest:
            return
        started = time.perf_counter()
        try:
            self._assessor.capture_outputs()
        except BaselineError as error:
            # Only a run that is monitored keeps broken weights: it is told, and judged by the last sound baseline.
            logger.warning("the baseline stays as it was before training moved the model: %s", error)
            return
        self._current = read_state(self.model, tensors, progress=True)
        self.baseline = replace(self.baseline, readings=self._current.readings, fits=self._current.fits)
        self.cost.baseline_seconds += time.perf_counter() - started

    def _stray_names(self, snapshot: Snapshot) -> frozenset[str]:
        """Tensors that changed since the last accepted state, outside of any guarded change."""
        known = self._present.readings.tensors
        differing = {
            name for name, digest in snapshot.digests.items() if name not in known or known[name].digest != digest
        }
        stray = frozenset(differing | (known.keys() - snapshot.digests.keys()))
        if stray:
            shown = ", ".join(sorted(stray)[:3])
            logger.warning(
                "tensors changed outside of any guarded edit: %d (%s); they are judged with this one", len(stray), shown
            )
        return stray

    def _judge(self, handle: Step, snapshot: Snapshot, current: State, subject: Subject) -> State:
        """Read and judge the model as it is now; `current` are the readings of the state in `snapshot`."""
        started = time.perf_counter()
        result = self._assessor.assess(snapshot, current, self.baseline, subject, handle.step)
        fixes = self._assessor.corrections(self.baseline, result.state.readings)
        if fixes:
            corrected = self._correct(fixes)
            subject = replace(subject, planned={}, corrected=corrected)
            result = self._assessor.assess(snapshot, current, self.baseline, subject, handle.step)
        handle.decision, handle.record = result.decision, result.state.readings.edit
        if self.trackers and subject.kind.name != "train":
            self._picture = evidence.spectrum_of_worst(handle, self.model, self.baseline)
        handle.seconds = time.perf_counter() - started
        self.cost.check_seconds += handle.seconds
        self.cost.checks += 1
        return result.state

    def _correct(self, fixes: Sequence[tuple[Correction, str]]) -> tuple[str, ...]:
        """Write each correction once, tied copies with it; returns what was done, in words."""
        by_name = {matrix.name: matrix for matrix in iter_weight_matrices(self.model)}
        done: list[str] = []
        for correction, mode in fixes:
            matrix = by_name[correction.name]
            write_matrix(matrix, apply_correction(matrix.load(), correction, mode))
            done.append(f"{mode} {correction.name}")
        return tuple(done)

    def _settle(self, handle: Step, point: SafePoint, state: State, on_violation: str, *, window: bool = False) -> None:
        decision = handle.decision
        if decision is None:
            raise InputError(f"step {handle.name!r} was not judged")
        keep = decision.action is Action.KEEP or on_violation == "monitor"
        handle.applied = "kept" if keep else "restored"
        if keep:
            kept = decision.action is Action.KEEP
            self._accept(state, window=window, trained=kept and handle.kind.name == "train", spiked=not kept)
        else:
            try:
                self._restore(point)
                if window:
                    self._held = None
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

    def _accept(self, state: State, *, window: bool, trained: bool, spiked: bool) -> None:
        if window and self._held is None and not spiked and self._grew_untrained(state):
            # Growth of an unlearned matrix proves nothing until a loss has been seen with it: keep
            # the older last good state for one more window.
            self._held = state
            return
        self._held, self._current = None, state
        if window or trained:
            self.baseline = replace(self.baseline, readings=state.readings, fits=state.fits)
            self._assessor.outputs_moved()
        if self._last_good is not None:
            self.watch()

    def _grew_untrained(self, state: State) -> bool:
        """Whether a matrix without learned structure changed its norm grossly."""
        before, after = self.baseline.readings.matrices, state.readings.matrices
        for name in state.readings.untrained & before.keys():
            old, new = before[name].spectral_norm, after[name].spectral_norm
            if old and new is not None and not 0.1 <= new / old <= 10.0:
                return True
        return False

    def _restore(self, point: SafePoint) -> None:
        point.snapshot.restore()
        self._assessor.prove_forward(point.forward)

    # -- evidence ------------------------------------------------------------------------------

    def _publish(self, handle: Step) -> None:
        """Record a judged step: history, then the certificate file, then the trackers."""
        self._history.append(handle)
        try:
            self._write_evidence(handle)
        except (OSError, WeightproofError) as error:
            # The verdict stands and was carried out: a full disk may not undo it, nor hide it behind another error.
            logger.error("the evidence of step %d, %s, could not be written: %s", handle.step, handle.name, error)

    def _write_evidence(self, handle: Step) -> None:
        picture, self._picture = self._picture, None
        # The certificate carries every step: written after each quiet window, a run would take quadratic time.
        path = None if _is_quiet(handle) else self._save_certificate()
        event = evidence.event_of(handle)
        for tracker in self.trackers:
            tracker.log_event(event)
            if picture is not None:
                tracker.log_picture("guard/spectrum", picture, handle.step)
            if path is not None and handle.kind.name != "train":
                tracker.log_certificate(path, action=event.action, step=handle.step)

    def _save_certificate(self) -> Path | None:
        return None if self.output_dir is None else self.certificate().save(self.output_dir / "certificate.json")

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
        """The windows on which outputs are compared (random tokens, then `retain`)."""
        return self._assessor.windows

    # -- resume --------------------------------------------------------------------------------

    def save_state(self, folder: Path | str) -> None:
        """Write the sidecar files of a checkpoint: history, the baseline, and the present readings where they differ.

        The baseline's outputs are not kept: after a resume outputs are compared with those of the resumed weights.
        """
        folder = Path(folder)
        current = self._present
        moved = current.readings.model_digest != self.baseline.model_digest
        state = {
            "format": STATE_FORMAT,
            "model_digest": current.readings.model_digest,
            "policy_digest": self.policy.digest,
            "losses": self._losses,
            "moved": moved,
            "outputs_stale": self._assessor.is_stale,
            "steps": [*self._resumed, *(evidence.step_json(step) for step in self._history)],
        }
        self.baseline.save(folder)
        if moved:
            replace(self.baseline, readings=current.readings, fits=current.fits).save(folder / CURRENT_FILE)
        write_atomically(folder / STATE_FILE, json.dumps(state, allow_nan=False).encode())

    def load_state(self, folder: Path | str) -> None:
        """Continue from sidecar files, after proving that the weights are those they describe.

        Later edits are still judged against the baseline of the first session, so that many small harms add up.

        Raises:
            BaselineError: If the files are missing, altered, or the model's weights differ.
        """
        path = Path(folder) / STATE_FILE
        try:
            state = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BaselineError(f"no usable guard state at {path} ({error})") from error
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise BaselineError(f"{path} is no guard state that this version reads (format {STATE_FORMAT})")
        if state.get("policy_digest") != self.policy.digest:
            logger.warning("the run resumes under another policy (%s) than it was begun with", self.policy.name)
        saved = Baseline.load(folder)
        current = Baseline.load(Path(folder) / CURRENT_FILE) if state.get("moved") else saved
        current.require_same_model(read_tensors(self.model, {}, ()))
        self.baseline = saved
        self._held, self._current = None, State(current.readings, current.fits)
        self._losses = list(state["losses"])
        self._resumed = list(state["steps"])
        if state.get("outputs_stale", True):
            self._assessor.outputs_moved()
        else:
            self._assessor.capture_outputs()
        if self._last_good is not None:
            self.watch()

    def close(self) -> None:
        """Write what the certificate still lacks, free the last good snapshot, close the trackers.

        Nothing can be judged afterwards.

        Raises:
            InputError: If the certificate cannot be written; everything is freed and closed all the same.
        """
        try:
            if not self._closed and self._history and _is_quiet(self._history[-1]):
                self._save_certificate()
        finally:
            self._release()

    def _release(self) -> None:
        self._closed = True
        if self._last_good is not None:
            self._last_good.snapshot.discard()
            self._last_good = None
        for tracker in self.trackers:
            tracker.close()


def _world_size(accelerator: Any) -> int:
    """Processes of this run, whoever launched them."""
    distributed = torch.distributed
    launched = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return max(launched, 1 if accelerator is None else accelerator.num_processes)


def _is_quiet(step: Step) -> bool:
    """Whether a step is a window of training that was kept without a warning: the event log suffices for it."""
    decision = step.decision
    return step.kind.name == "train" and decision is not None and decision.action is Action.KEEP and not decision.warned


def _parse_targets(targets: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """One glob or several as a tuple; None where nothing was declared."""
    if targets is None or isinstance(targets, str):
        return None if targets is None else (targets,)
    found: tuple[object, ...] = tuple(targets) if isinstance(targets, Iterable) else (targets,)
    names = tuple(target for target in found if isinstance(target, str))
    if len(names) != len(found):
        raise InputError(f"targets must be a glob or a list of globs such as 'model.layers.*', not {targets!r}")
    return names


def _require_finite(tensors: dict[str, TensorReading] | Any) -> None:
    broken = [reading for reading in tensors.values() if reading.num_nonfinite and not reading.is_infinite_by_design]
    if broken:
        shown = ", ".join(f"{reading.name} ({reading.num_nonfinite})" for reading in broken[:3])
        raise BaselineError(
            f"the baseline itself holds NaN or inf in {len(broken)} tensors: {shown}. Nothing can be certified "
            "against a broken model: repair or reload it first"
        )
