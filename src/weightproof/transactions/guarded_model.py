"""A model under guard: the last state of it that was accepted, and how it is taken back to one.

What moves between edits and windows of training is here, in three names: `baseline`, what edits are judged against;
`current`, the readings of the last accepted state; `held`, those of a window that was kept and is not final yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from weightproof.baseline import Baseline
from weightproof.errors import BaselineError
from weightproof.judgement import evidence
from weightproof.judgement.assessment import Assessor
from weightproof.parallel.placements import settle
from weightproof.probes import State, looks_untrained, read_state
from weightproof.readings.tensors import digest_of, read_tensors
from weightproof.snapshot import Snapshot
from weightproof.snapshots.ring_stores import KeepWeights, KeptSnapshot
from weightproof.transactions.checks import from_main, loaded, require_sound
from weightproof.transactions.steps import Cost, MasterWeights, SafePoint

logger = logging.getLogger("weightproof")


class GuardedModel:
    """One model, what is known of it, and what measures and judges it. All ranks make the same calls.

    Args:
        assessor: Measures and judges the model.
        baseline: One captured earlier from this very model, or its path; None: captured now.
        masters: See `GuardSession`.
        snapshot_dir: Keep snapshots in this folder instead of in memory.

    Attributes:
        baseline: What edits are judged against.
        current: Readings of the last accepted state.
        held: Readings of a window of training that was kept, while the next one may still show that it was bad.
        cost: What guarding cost so far.

    Raises:
        BaselineError: The model holds NaN or inf, differs between processes, or `baseline` is of another model.
    """

    def __init__(
        self,
        assessor: Assessor,
        baseline: Baseline | Path | str | None = None,
        *,
        masters: MasterWeights | None = None,
        snapshot_dir: Path | None = None,
    ) -> None:
        self.assessor = assessor
        self.model = assessor.model
        self.processes = assessor.processes
        self.masters = masters
        self.snapshot_dir = snapshot_dir
        self.cost = Cost()
        self.held: State | None = None
        started = time.perf_counter()
        with self.processes.together("capturing the baseline"):
            self.baseline = self._capture_baseline(baseline)
        self.current = State(self.baseline.readings, self.baseline.fits)
        self.cost.baseline_seconds = time.perf_counter() - started
        self.cost.baseline_bytes = evidence.baseline_bytes(self.baseline, assessor.cache)

    @property
    def present(self) -> State:
        """Readings of the weights that the last judged change left, though they may await the next window."""
        return self.held or self.current

    @property
    def digest(self) -> str:
        """SHA-256 over the per-tensor digests of the last accepted state."""
        return self.current.readings.model_digest

    # -- baseline ------------------------------------------------------------------------------

    def _capture_baseline(self, given: Baseline | Path | str | None) -> Baseline:
        self.assessor.forward_digest()  # settles buffers that a forward pass rewrites, before they are read
        if given is not None:
            baseline = from_main(self.processes, "the baseline", lambda: loaded(given))
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
        self.assessor.capture_outputs()
        return baseline

    def refresh_baseline(self) -> None:
        """Read the baseline whole again after training moved it: windows refresh only a share of the spectra.

        Left alone when the weights are not those last accepted; then the edit is judged against the older one.
        """
        if not self.assessor.is_stale:
            return
        tensors = read_tensors(self.model, {}, (), self.processes)
        if digest_of(tensors) != self.digest:
            return
        started = time.perf_counter()
        try:
            self.assessor.capture_outputs()
        except BaselineError as error:
            # Only a run that is monitored keeps broken weights: it is told, and judged by the last sound baseline.
            logger.warning("the baseline stays as it was before training moved the model: %s", error)
            return
        self.current = read_state(self.model, tensors, processes=self.processes, progress=True)
        self.baseline = replace(self.baseline, readings=self.current.readings, fits=self.current.fits)
        self.cost.baseline_seconds += time.perf_counter() - started

    def capture_losses(self) -> None:
        """Read the losses before the first edit, or the first after training: only edits are judged by them."""
        started = time.perf_counter()
        self.assessor.capture_losses()
        self.cost.baseline_seconds += time.perf_counter() - started

    # -- states that are accepted, put in place, taken over ------------------------------------

    def accept(self, state: State, *, as_baseline: bool) -> None:
        """Take the state that the model is in now as accepted; where training made it, edits are judged against it."""
        self.held, self.current = None, state
        if as_baseline:
            self.baseline = replace(self.baseline, readings=state.readings, fits=state.fits)
            self.assessor.outputs_moved()

    def put_in_place(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write a state that was kept in files into the model, prove it, and take it as the baseline.

        Args:
            values: As `Snapshot.present` gave them.

        Raises:
            InputError: They are of another model.
            RestoreError: They could not be proven in place.
        """
        with self.processes.together("continuing from a kept state"):
            snapshot = Snapshot.of_values(self.model, values, self._kept_beside())
            snapshot.restore()
            snapshot.discard()
        with self.processes.together("capturing the baseline"):
            self.baseline = self._capture_baseline(None)
        self.current = State(self.baseline.readings, self.baseline.fits)

    def resume(self, baseline: Baseline, current: State, *, outputs_stale: bool) -> None:
        """Take over what another session knew of these very weights.

        Raises:
            BaselineError: The model's weights are not those of `current`.
        """
        readings = read_tensors(self.model, {}, (), self.processes)
        Baseline(current.readings, {}, {}, "").require_same_model(readings)
        self.baseline = baseline
        self.held, self.current = None, current
        if outputs_stale:
            self.assessor.outputs_moved()
        else:
            self.assessor.capture_outputs()

    # -- safe points ---------------------------------------------------------------------------

    def safe_point(self, keep: KeepWeights | None = None) -> SafePoint:
        """The state that the model is in now, to go back to (every process its own part).

        Args:
            keep: Keeps the weights; None: a snapshot of its own, in memory or in `snapshot_dir`.
        """
        started = time.perf_counter()
        with self.processes.together("taking a snapshot"):
            # The forward pass comes first: some models rewrite a buffer in it (rotary tables that follow the length).
            forward = self.assessor.forward_digest()
            settle(self.model)
            beside = self._kept_beside()
            if keep is None:
                snapshot = Snapshot.capture(self.model, self.snapshot_dir, beside)
            else:
                snapshot = KeptSnapshot.kept_by(self.model, keep, beside)
        point = SafePoint(snapshot, forward)
        self.cost.snapshot_seconds += time.perf_counter() - started
        self.cost.snapshot_bytes = max(self.cost.snapshot_bytes, snapshot.nbytes)
        return point

    def _kept_beside(self) -> Mapping[str, torch.Tensor]:
        return {} if self.masters is None else self.masters.tensors()

    def restore(self, point: SafePoint) -> None:
        """Put this process's part back; proven by digests, and by a forward pass while the others are there.

        Raises:
            RestoreError: It could not be proven exact.
        """
        if self.processes.lost:
            point.put_back()
            return
        with self.processes.together("restoring the snapshot"):
            point.put_back()
        with self.processes.together("proving the restore"):
            self.assessor.prove_forward(point.forward)
