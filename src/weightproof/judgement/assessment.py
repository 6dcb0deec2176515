"""Measure a change and judge it: the half of a guard session that never writes a weight.

`Assessor` holds what judging needs beside the model: the policy, the guards with their limits, the
windows on which outputs are compared and the baseline's outputs on them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from weightproof.baseline import Baseline
from weightproof.collective import Processes
from weightproof.contracts.preserving import NAME as PRESERVING
from weightproof.contracts.preserving import preserving_readings
from weightproof.curvature.factors import Factors
from weightproof.divergence import (
    OutputCache,
    OutputPass,
    capture_outputs,
    forward_digest,
    locate_damage,
    measure_divergence,
)
from weightproof.errors import InputError, RestoreError
from weightproof.folders.readers import packed_weights
from weightproof.forward.calibration import calibration_windows
from weightproof.forward.windows import Windows, random_windows
from weightproof.guards.corrections import Correction, corrections
from weightproof.guards.limits import for_family
from weightproof.judgement.curvature_probe import MOVED, CurvatureProbe
from weightproof.judgement.judging import Judged, decide_on, is_asked, judge_one
from weightproof.judgement.subspace_probe import SubspaceProbe, carry
from weightproof.losses import LossData, LossProbe
from weightproof.policy import Policy, with_digests
from weightproof.probes import State, common_matrices
from weightproof.readings.changes import ChangeScope, read_change
from weightproof.registry import load_plugin, plugins
from weightproof.snapshot import Snapshot
from weightproof.transactions.edit_records import Differences, Subject, record_of
from weightproof.transactions.training_turns import TrainingTurns
from weightproof.types import (
    Action,
    BlockError,
    ContractReading,
    Decision,
    DivergenceReading,
    LossForecast,
    LossReading,
    MatrixReading,
    Outcome,
    Readings,
    SubspaceReading,
    Verdict,
)

if TYPE_CHECKING:
    from weightproof.guards.loss import LossLimits
    from weightproof.guards.subspace import SubspaceLimits

# Windows of the retain data on which outputs are compared; the loss reads all of it.
CALIBRATION_WINDOWS = 8


@dataclass(frozen=True)
class Assessment:
    """Everything read after a change, the decision it led to, and the readings that this rests on."""

    state: State
    decision: Decision
    judged: Judged


class Assessor:
    """Judges changes of one model under one policy.

    Args:
        model: The guarded model.
        policy: The resolved policy.
        retain: Data on which the model must not get worse, or None for random tokens alone.
        processes: Who takes part; every one of them calls every method alike.
        target: Data on which an edit must gain.
        tokenizer_digest: What made the token ids of both, where it is known.
        factors: Kronecker factors of the model; see `prove_factors`.

    Raises:
        InputError: `retain` or `target` is empty or the model cannot run on it.
    """

    def __init__(  # noqa: PLR0913 - what a session hands over
        self,
        model: nn.Module,
        policy: Policy,
        retain: Any,
        processes: Processes,
        *,
        target: Any = None,
        tokenizer_digest: str | None = None,
        factors: Factors | None = None,
    ) -> None:
        self.model = model
        self.processes = processes
        self.policy = policy
        self.guards = {name: load_plugin("weightproof.guards", name)() for name in plugins("weightproof.guards")}
        self.limits = {name: policy.limits_for(type(guard)) for name, guard in self.guards.items()}
        self.cache: OutputCache | None = None
        self._reference: OutputCache | None = None
        self.no_outputs = "the model's inputs cannot be guessed from its config and no retain= data was given"
        random = random_windows(model)
        limits = cast("LossLimits", self.limits["loss"])
        self.loss = LossProbe(model, retain, target, limits, processes, tokenizer_digest=tokenizer_digest)
        calibration = None if retain is None else self._calibration_windows(retain)
        self._random, self._calibration = random, calibration
        self._stale = True
        self.turns = TrainingTurns()
        self.factors = factors
        self._curvature: CurvatureProbe | None = None
        self._fitted_at = ""
        self._subspace = self._subspace_probe()

    def _calibration_windows(self, retain: Any) -> Windows:
        """The first windows of the retain data, also where that was read to its end already, or is a file."""
        data = retain.data if isinstance(retain, LossData) else retain
        if isinstance(data, (str, os.PathLike, Iterator)):
            data = self.loss.first(CALIBRATION_WINDOWS) or data  # nothing was read where no loss is known
        return calibration_windows(data, self.model, count=CALIBRATION_WINDOWS)

    @property
    def windows(self) -> tuple[Windows, ...]:
        """Random-token windows, then calibration windows, as far as there are any."""
        return tuple(w for w in (self._random, self._calibration) if w is not None)

    @property
    def all_windows(self) -> tuple[Any, ...]:
        """These, then those on which the loss is read."""
        return (*self.windows, *self.loss.windows)

    # -- losses --------------------------------------------------------------------------------

    def capture_losses(self) -> None:
        """Read the losses of the model as it is now, where those before the next edit are not known."""
        if self.loss.is_stale:
            self.loss.capture()

    def _losses(self, subject: Subject) -> tuple[LossReading, ...]:
        """Losses against those before; a window of ordinary training is judged by its raw losses instead."""
        return () if subject.kind.name == "train" else self.loss.measure()

    # -- outputs -------------------------------------------------------------------------------

    def capture_outputs(self) -> None:
        """Cache the outputs of the model as it is now: later outputs are compared with these."""
        self._stale = False
        if self._random is not None and (broken := self._error_on(self._random)):
            self.no_outputs = f"the model does not run on random inputs ({broken})"
            self._random = None
        if not self.windows:
            self.cache = None
            return
        try:
            self.cache = capture_outputs(self.model, self.windows, processes=self.processes)
        except InputError as error:
            if self._calibration is not None:
                raise InputError(f"the model does not run on the retain= data: {_brief(error)}") from error
            self.no_outputs = f"outputs cannot be compared: {_brief(error)}"
            self.cache, self._random = None, None

    def capture_reference(self, *, wanted: bool, current_is_baseline: bool) -> None:
        """Ready the outputs just before a change that claims to preserve them.

        Args:
            wanted: Run the model for them; else the baseline's serve, where it is in that state.
            current_is_baseline: Whether it is.
        """
        self._reference = self.cache if current_is_baseline else None
        if wanted and self.cache is not None:
            self._reference = capture_outputs(self.model, self.windows, processes=self.processes)

    def _error_on(self, windows: Windows) -> str | None:
        """Why the model cannot run on windows, on any process."""
        ours = None
        with self.processes.together("a first forward pass"):
            try:
                forward_digest(self.model, (windows,))
            except InputError as error:
                ours = _brief(error)
        return next((error for error in self.processes.gather("a first forward pass", ours) if error), None)

    @property
    def is_stale(self) -> bool:
        """Whether training moved the model since its outputs were captured."""
        return self._stale

    def outputs_moved(self) -> None:
        """The reference changed (training went on): it must be captured again before the next edit."""
        self._stale = True
        self.loss.moved()

    def forward_digest(self) -> str | None:
        """Digest of the model's exact outputs on the first window; None when it has no window."""
        if not self.windows:
            return None
        try:
            return forward_digest(self.model, self.windows)
        except InputError as error:
            return f"raises {_brief(error)}"

    def prove_forward(self, expected: str | None) -> None:
        """Prove that the restored model computes what it computed at the safe point.

        Raises:
            RestoreError: If a deterministic model gives other outputs although every tensor is equal.
        """
        now = self.forward_digest()
        if not any(self.processes.gather("outputs after the restore", now != expected)):
            return
        again = self.forward_digest()  # where weights are sharded, all must run it
        if now != expected and now == again:
            raise RestoreError(
                "every tensor was restored, yet the model's outputs differ from those before the change: something "
                "outside its parameters and buffers was changed (a hook, a config value, a cached table)"
            )

    def _outputs(self, cache: OutputCache | None, turn: int | None = None) -> OutputPass | None:
        if cache is None:
            return None
        try:
            return measure_divergence(self.model, cache, processes=self.processes, turn=turn)
        except InputError as error:
            # The same windows ran before the change: a forward pass that now raises is broken.
            why = f"the model no longer runs on windows that it ran on before: {_brief(error)}"
            lost = tuple(
                DivergenceReading(w.name, w.digest, w.num_tokens, None, None, None, None, finite=False, reason=why)
                for w in self.windows
            )
            return OutputPass(divergence=lost, second_moments={})

    # -- curvature -----------------------------------------------------------------------------

    def prove_factors(self) -> None:
        """Prove that the factors, where there are some, are of the weights as they are now.

        Raises:
            InputError: They are of another model or of other weights (both hashes are named), or unusable.
        """
        if self.factors is not None:
            every = common_matrices(self.model, self.processes)
            self._curvature = CurvatureProbe.of(self.factors, every, self.processes, is_live=True)

    def factors_are_of(self, model_digest: str) -> None:
        """The digest of the model whose factors were proven: a baseline of other weights is not what they are of."""
        self._fitted_at = model_digest

    def _forecast(self, baseline: Readings, after: Readings, subject: Subject) -> LossForecast | str | None:
        """What an edit should cost by curvature, or why that is not known; None where nobody asks."""
        if self._curvature is None or subject.kind.name == "train":
            return None
        if baseline.model_digest != self._fitted_at:
            return MOVED
        return self._curvature.read(common_matrices(self.model, self.processes), baseline.tensors, after.tensors)

    # -- directions ----------------------------------------------------------------------------

    def _subspace_probe(self) -> SubspaceProbe | None:
        limits = cast("SubspaceLimits | None", self.limits.get("subspace"))
        return None if limits is None else SubspaceProbe.of(limits, self.processes)

    def _directions(
        self, snapshot: Snapshot, found: Differences, states: tuple[Readings, Readings, Readings], kind: str
    ) -> SubspaceReading | None:
        """The directions that a merge or steering brought; of other changes what earlier ones did, None for nothing.

        Args:
            snapshot: The matrices before the change.
            found: What differs from it.
            states: Readings at the baseline, before the change and after it.
            kind: Of the change.
        """
        baseline, before, after = states
        if self._subspace is None or not self._subspace.concerns(kind):
            return None if kind == "train" else carry(before.subspace, baseline, after)
        every = common_matrices(self.model, self.processes)
        return self._subspace.read(every, found.names, snapshot, baseline, before, after)

    # -- one change ----------------------------------------------------------------------------

    def assess(self, snapshot: Snapshot, current: State, baseline: Baseline, subject: Subject, step: int) -> Assessment:
        """Read the changed model and judge it against `baseline`; the same on every process."""
        if packed_weights(self.model):
            self.forward_digest()  # some backends arrange their codes anew at the first forward pass
        found = Differences.of(snapshot, self.processes)
        matrices, turns = current.readings.matrices, self.turns if subject.window is not None else None
        scope = ChangeScope(
            norm_band=self._norm_band,
            count_slack=self._count_slack,
            bulk_names=self._bulk_names(matrices, subject),
            norm_names=None if turns is None else turns.norm_names(matrices),
            coarse_band=self._coarse_band,
            touched=found.names,
            stray=subject.stray,
            kind=subject.kind,
            planned=subject.planned,
        )
        base = State(baseline.readings, baseline.fits)
        change = read_change(self.model, snapshot, current, base, scope, processes=self.processes)
        read = change.state.readings
        outputs, losses = self._outputs(self.cache, turns.outputs() if turns else None), self._losses(subject)
        unmeasured = dict(read.unmeasured)
        if not losses:
            unmeasured["losses"] = "there is no loss data: give retain= data"
        if outputs is None:
            unmeasured["divergence"] = unmeasured["outputs"] = unmeasured["second_moments"] = self.no_outputs
        forecast = self._forecast(baseline.readings, read, subject)
        if isinstance(forecast, str):
            unmeasured["curvature"] = forecast
        states = baseline.readings, current.readings, read
        record = record_of(subject, current.readings, change, found, model=self.model, processes=self.processes)
        if subject.kind.name == PRESERVING and subject.contract is None:
            record = replace(record, contract=(*record.contract, *self._preserved(current.readings, read)))
        readings = replace(
            read,
            edit=record,
            divergence=outputs.divergence if outputs else (),
            second_moments=outputs.second_moments if outputs else {},
            losses=losses,
            unmeasured=unmeasured,
            raw_losses=subject.raw_losses,
            loss_spike=subject.loss_spike,
            in_warmup=subject.in_warmup,
            window=subject.window,
            health=subject.health,
            curvature=forecast if isinstance(forecast, LossForecast) else None,
            subspace=self._directions(snapshot, found, states, subject.kind.name),
        )
        before = replace(baseline.readings, second_moments=self._moments_before(outputs))
        judged = Judged(before, current.readings, readings)
        verdicts = {name: self._judge(name, judged) for name in self.guards if is_asked(self.guards[name], readings)}
        failed = verdicts["divergence"].outcome is Outcome.FAIL
        if failed and subject.kind.name != "train" and any(reading.finite for reading in readings.divergence):
            judged = replace(judged, after=self._located(readings))
            verdicts["divergence"] = self._judge("divergence", judged)
        kind, size = subject.kind.name, self.processes.size
        decision = self._agreed(decide_on(self.policy, verdicts, kind=kind, step=step, world_size=size))
        return Assessment(State(judged.after, change.state.fits), decision, judged)

    def _preserved(self, before: Readings, after: Readings) -> tuple[ContractReading, ...]:
        outputs = self._outputs(self._reference)
        return preserving_readings(before, after, outputs.divergence if outputs else (), self.no_outputs)

    def _agreed(self, decision: Decision) -> Decision:
        """The decision, proven to be the same on every process; HALT where it is not."""
        every = self.processes.gather("decisions", (decision.digest, decision.evidence_digest, str(decision.action)))
        odd = [rank for rank, theirs in enumerate(every) if theirs != every[0]]
        if not odd:
            return decision
        said = ", ".join(f"rank {rank} {every[rank][2]} ({every[rank][1][:12]})" for rank in (0, *odd))
        return self.halted(decision, f"processes disagree on this step: {said}", situation="processes_disagree")

    def _judge(self, name: str, judged: Judged) -> Verdict:
        return judge_one(self.guards[name], self.limits[name], judged)

    def corrections(self, baseline: Baseline, after: Readings) -> list[tuple[Correction, str]]:
        """Corrections that the policy asks for (none by default), with their mode."""
        found: list[tuple[Correction, str]] = []
        for limits in self.limits.values():
            mode = getattr(limits, "correct", None)
            if mode is not None:
                asked = corrections(baseline.readings, after, limits)
                taken = {correction.name for correction, _ in found}
                found += [(correction, mode) for correction in asked if correction.name not in taken]
        return found

    def halted(self, decision: Decision, reason: str, *, situation: str = "restore_not_proven") -> Decision:
        """The decision after a restore that could not be proven, or where processes disagree."""
        halted = replace(decision, action=Action.HALT, situation=situation, reason=reason)
        return with_digests(halted)

    def block_errors(self) -> tuple[BlockError, ...]:
        """Teacher-forced output error of every block of the model as it is now; () where it cannot be traced."""
        try:
            return () if self.cache is None else locate_damage(self.model, self.cache, processes=self.processes)
        except InputError:
            return ()

    def _located(self, readings: Readings) -> Readings:
        blocks = self.block_errors()
        first = replace(readings.divergence[0], blocks=blocks)
        return replace(readings, divergence=(first, *readings.divergence[1:]))

    def _norm_band(self, family: str) -> float:
        limits = self.limits.get("spectral")
        return 0.1 if limits is None else for_family(limits.kappa, family)

    def _bulk_names(self, matrices: Mapping[str, MatrixReading], subject: Subject) -> Sequence[str] | None:
        """All matrices after an edit; in training a share, so that a check stays cheap."""
        if subject.kind.name != "train":
            return None
        return self.turns.bulk_names(matrices, is_window=subject.window is not None)

    @property
    def _coarse_band(self) -> float:
        """Half of the band, in log units, within which growth is judged in training: errors add up until it is left."""
        limits = self.limits.get("spectral")
        return 0.5 * math.log(10.0 if limits is None else limits.gross_growth)

    def _moments_before(self, outputs: OutputPass | None) -> Mapping[str, float]:
        """Second moments of the baseline on the windows that were read now."""
        if self.cache is None or outputs is None:
            return {}
        read = tuple(f"{reading.windows}:" for reading in outputs.divergence)
        return {name: value for name, value in self.cache.second_moments.items() if name.startswith(read)}

    def _count_slack(self, family: str, count: int) -> int:
        """Half of the band within which a family's spike count is judged: the most a bound may leave open."""
        limits = self.limits.get("rmt")
        if limits is None:
            return 0
        return int(limits.band(family, count)) // 2


def _brief(error: InputError) -> str:
    """First line of an error, short enough for a reason."""
    return str(error).splitlines()[0][:200]
