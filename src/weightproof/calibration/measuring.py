"""Make a drawn edit, measure what every guard would compare with its limit, and the truth; put the model back.

Spectra are read exactly, not by the ladder of a session, which stops as soon as a limit is decided and may leave the
middle of an interval. What a session may leave open is added where limits are fitted (`fitting`). The names of the
statistics, each the largest size over its targets:

- `kappa/<family>`, `kappa_stable_rank/<family>`, `kappa_collapse/<family>`: log ratios to the baseline, of the spectral
  norm, the stable rank and the norm collapse; `size/<family>`: of the Frobenius norm;
- `spikes_moved/<family>`, `spikes/<family>`: how far the number of outliers of a family moved, and what it was; a gain
  counts where a session would judge it: of casts, quantization and pruning, declared as such;
- `distance`: of circuits; `band`: of second moments, log ratio; `kl`, `hidden_error`: of outputs;
- `num_matrices`: how many matrices the edit changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from weightproof.calibration.drawing import Choices, EditDraw
from weightproof.calibration.draws import Draw, Truth
from weightproof.calibration.preserving_edits import KINDS, candidates, preserving_plan
from weightproof.calibration.splitting import halves
from weightproof.calibration.value_edits import FAMILIES, block_of, value_plan
from weightproof.collective import Processes
from weightproof.divergence import measure_divergence
from weightproof.errors import InputError
from weightproof.guards.loss import LossLimits
from weightproof.guards.rmt import NO_GAIN
from weightproof.guards.spectral import COLLAPSE, GROWTH, STABLE_RANK
from weightproof.judgement.assessment import Assessor
from weightproof.judgement.plans import rewrite, vectors
from weightproof.losses import LossProbe
from weightproof.policy import Policy
from weightproof.probes import Findings, assembled, common_matrices, read_state, read_whole
from weightproof.readings.circuit_finder import find_circuits
from weightproof.readings.circuits import config_of, read_circuits, vectors_of
from weightproof.snapshot import Snapshot
from weightproof.statistics.paired import SEQUENTIAL_SHARE
from weightproof.types import Measurement, Readings, WeightMatrix

_SPECTRAL = {GROWTH: "kappa", STABLE_RANK: "kappa_stable_rank", COLLAPSE: "kappa_collapse"}
_GUARDS = ("spectral", "rmt", "circuits", "variance", "divergence")
# A preserving edit that moves the outputs by more than this (nats per token) does not preserve this model's function.
ROUNDING = 1e-3
# What an edit would be declared as, where that makes a difference to a guard.
_JUDGED_KINDS = {"cast": "cast", "rtn": "quantize", "prune": "prune"}
# Of the intervals of the truth, whatever the policy says.
_ALPHA = 0.05


class Bench:
    """One model, read once, on which edits are tried.

    Args:
        model: Any model that can be run; it is as it was after every call.
        policy: Whose floors and lengths the data are read with.
        retain: Data, half of which tell the truth; None: only edits that are harmless by construction are drawn.

    Attributes:
        digest: Of the model.
        data_digest: Of the windows of the truth; None without data.
        choices: What is drawn from.
        notes: What this model does not admit, in sentences.

    Raises:
        InputError: The model cannot be run, or the data are too few.
        BaselineError: Its outputs, or a weight, are NaN or infinite.
    """

    def __init__(self, model: nn.Module, policy: Policy, retain: Any = None) -> None:
        self._model = model
        self._processes = Processes.alone()
        given, hidden = (None, None) if retain is None else halves(retain, model)
        self._assessor = Assessor(model, policy, given, self._processes)
        self._assessor.capture_outputs()
        if self._assessor.cache is None:
            raise InputError(f"this model cannot be calibrated: {self._assessor.no_outputs}")
        self._truth = None if hidden is None else self._probe(hidden, policy)
        self._state = read_state(model, progress=True)
        self.digest = self._state.readings.model_digest
        self.data_digest = None if self._truth is None else self._truth.windows[0].digest
        self._snapshot = Snapshot.capture(model)
        sizes = {name: one.size for name, one in vectors_of(model, self._processes).items()}
        self._circuits = find_circuits(common_matrices(model, self._processes), sizes, config_of(model))
        self._before = replace(self._state.readings, second_moments=self._assessor.cache.second_moments)
        admitted, self.notes = self._admitted()
        self.choices = Choices(*self._places(), admitted, safe=self._truth is None)

    def _probe(self, hidden: Any, policy: Policy) -> LossProbe:
        limits = policy.limits_for(type(self._assessor.guards["loss"]))
        assert isinstance(limits, LossLimits)
        # A fixed sample, looked at once: its interval gets the whole error.
        probe = LossProbe(
            self._model, hidden, None, replace(limits, alpha=_ALPHA / (1.0 - SEQUENTIAL_SHARE)), self._processes
        )
        probe.capture()
        reading = next((one for one in probe.measure(to_the_end=True) if one.metric == "nll"), None)
        if reading is None or reading.reason is not None:
            why = "no likelihood can be read from it" if reading is None else reading.reason
            raise InputError(
                f"half of the retain data must tell the truth about each edit, and cannot: {why}. Give more, or none: "
                "then only edits that are harmless by construction are drawn"
            )
        return probe

    def _places(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        editable = [one for one in self._matrices() if one.family in FAMILIES]
        if not editable:
            raise InputError(
                "this model has no attention or feed-forward matrix that can be written: nothing can be drawn"
            )
        blocks = dict.fromkeys(block for one in editable if (block := block_of(one.name)) is not None)
        return tuple(blocks), tuple(dict.fromkeys(one.family for one in editable))

    def _matrices(self) -> list[WeightMatrix]:
        """What can be written: matrices, then biases and gains as n x 1 matrices."""
        every = [*common_matrices(self._model, self._processes), *vectors(self._model)]
        return [one for one in every if one.refusal is None and one.is_view]

    def _admitted(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The preserving edits that this model admits, and why it admits no others."""
        wanted = candidates(self._circuits)
        notes = [f"{kind}: no part of this model is known to allow it" for kind in KINDS if kind not in wanted]
        found: list[str] = []
        for kind in wanted:
            moved = self.measure(EditDraw(-1, 1, kind, {"factor": 10.0}, "all", preserving=True)).statistics
            change = max(moved.get("kl", 0.0), moved.get("hidden_error", 0.0))
            if change <= ROUNDING:
                found.append(kind)
            else:
                notes.append(f"{kind}: moves the outputs of this model by {change:.2g}, so it does not preserve them")
        return tuple(found), tuple(notes)

    # -- one draw ----------------------------------------------------------------------------------

    def measure(self, drawn: EditDraw) -> Draw:
        """Make the edit, measure it, take it back.

        Raises:
            RestoreError: If the model could not be put back.
        """
        matrices = self._matrices()
        try:
            planned = rewrite(self._processes, drawn.name, matrices, self._plan(drawn, matrices))
            touched = frozenset(one.tensor_name for one in matrices if one.name in planned)
            found = Draw.of(drawn, self._true_change(drawn), self._statistics(touched, _JUDGED_KINDS.get(drawn.kind)))
        except BaseException:
            self._snapshot.restore()  # whatever was written until then
            raise
        self._snapshot.restore_tensors(touched)
        return found

    def _plan(self, drawn: EditDraw, matrices: list[WeightMatrix]) -> Callable[[WeightMatrix], torch.Tensor | None]:
        if drawn.kind not in KINDS:
            return value_plan(drawn)
        return preserving_plan(drawn, self._circuits, {one.name: one for one in matrices})

    def _true_change(self, drawn: EditDraw) -> Truth | None:
        if self._truth is None or drawn.number < 0:
            return None
        reading = next(one for one in self._truth.measure(to_the_end=True) if one.metric == "nll")
        if reading.difference is None or reading.lower is None or reading.upper is None:
            return Truth(math.inf, math.inf, math.inf)  # the loss is not finite any more
        return Truth(reading.difference, reading.lower, reading.upper)

    def _statistics(self, touched: frozenset[str], kind: str | None) -> dict[str, float]:
        after = self._after(touched)
        found: dict[str, float] = {"num_matrices": float(self._num_changed(touched))}
        for name in _GUARDS:
            guard = self._assessor.guards[name]
            for one in guard.judge(self._before, after, self._assessor.limits[name]).measurements:
                if one.statistic != "num_spikes_gained" or kind in NO_GAIN:
                    _note(found, one)
        for name, reading in after.matrices.items():
            then = self._before.matrices[name].frobenius_norm
            if then and reading.frobenius_norm:
                _largest(found, f"size/{reading.family}", math.log(reading.frobenius_norm / then))
        return {name: value for name, value in found.items() if _is_kept(name, found)}

    def _num_changed(self, touched: frozenset[str]) -> int:
        return sum(not touched.isdisjoint(one.tensor_names) for one in common_matrices(self._model, self._processes))

    def _after(self, touched: frozenset[str]) -> Readings:
        """Readings of the edited model: exact where it was changed, those before where it was not."""
        before, fits = self._state.readings, self._state.fits
        every = common_matrices(self._model, self._processes)
        found: dict[str, Findings] = {}
        for one in every:
            if one.refusal is not None:
                continue
            if touched.isdisjoint(one.tensor_names):
                found[one.name] = Findings(before.matrices[one.name], before.bulks[one.name], fits.get(one.name))
            else:
                found[one.name] = read_whole(one, one.load())
        readings = assembled(every, before.tensors, found, before.structure).readings
        circuits = read_circuits(
            every,
            vectors_of(self._model, self._processes),
            config_of(self._model),
            self._processes,
            lambda circuit, stored: before.circuits.get(circuit.name) if touched.isdisjoint(stored) else None,
        )
        assert self._assessor.cache is not None
        outputs = measure_divergence(self._model, self._assessor.cache)
        return replace(
            readings, circuits=circuits, divergence=outputs.divergence, second_moments=outputs.second_moments
        )


def _is_kept(name: str, found: Mapping[str, float]) -> bool:
    """Of families that did not move nothing is kept; a draw stays a short line."""
    stem, _, family = name.partition("/")
    return not family or found.get(f"spikes_moved/{family}" if stem == "spikes" else name, 0.0) > 0.0


def _note(found: dict[str, float], one: Measurement) -> None:
    """Keep the size of a measurement under the name of the limit that it is compared with."""
    if one.value is None:
        return
    match one.guard, one.statistic:
        case "spectral", name if name in _SPECTRAL:
            _largest(found, f"{_SPECTRAL[name]}/{one.family}", one.value)
        case "rmt", "num_spikes_lost" | "num_spikes_gained":
            _largest(found, f"spikes_moved/{one.family}", one.value)
            found[f"spikes/{one.family}"] = float(one.reference or 0.0)
        case "circuits", "relative_distance":
            _largest(found, "distance", one.value)
        case "variance", "log_second_moment_ratio":
            _largest(found, "band", one.value)
        case "divergence", "kl" | "hidden_error":
            _largest(found, one.statistic, one.value)
        case "divergence", "finite_outputs":
            found["kl"] = math.inf
        case _:
            return


def _largest(found: dict[str, float], name: str, value: float) -> None:
    size = math.inf if math.isnan(value) else abs(value)
    found[name] = max(found.get(name, 0.0), size)
